"""Auxiliary losses of mixtures of experts, from router statistics of the whole group.

The loss is a product of two means over tokens, so the mean of the shards' losses is another number.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seq1f1b.ulysses.errors import UnsupportedModelError
from seq1f1b.ulysses.mends.replaced import replace_function
from seq1f1b.ulysses.mesh import SequenceParallel
from seq1f1b.ulysses.run import current_run

_NAME = "load_balancing_loss_func"


def mend_router_losses(model: nn.Module) -> None:
    """Replace the load-balancing loss in the code of every layer that can call it."""
    for code in {type(module).__module__ for module in model.modules()}:
        replace_function(code, _NAME, _balance_loss)


def _balance_loss(
    original: Callable[..., Any],
    gate_logits: Any,
    num_experts: int | None = None,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Return the loss of the group's rows; arguments are those of transformers' function.

    Raises UnsupportedModelError when the family's own formula is another one.
    """
    run = current_run()
    if run is not None:
        run.refuse_parts("the load-balancing loss of routers")
    is_alone = run is None or run.parallel.size == 1
    if run is None or is_alone or not isinstance(gate_logits, tuple) or num_experts is None:
        return original(gate_logits, num_experts, top_k, attention_mask, **kwargs)
    with torch.no_grad():
        expected = original(gate_logits, num_experts, top_k, attention_mask, **kwargs)
        alone = _loss(_statistics(gate_logits, num_experts, top_k, attention_mask))
    if kwargs or not torch.allclose(expected.float(), alone, rtol=1e-4, equal_nan=True):
        raise UnsupportedModelError(
            f"{original.__module__}.{_NAME} is not the load-balancing loss of Switch Transformer, "
            f"and its group-wide form is not known: set output_router_logits to False"
        )
    statistics = _statistics(gate_logits, num_experts, top_k, attention_mask)
    return _loss(_SumOverGroup.apply(statistics, run.parallel)).to(expected.dtype)


def _statistics(
    gate_logits: tuple[Tensor, ...], num_experts: int, top_k: int, attention_mask: Tensor | None
) -> Tensor:
    """Return choices of each expert, its probability and the tokens, each summed over all layers.

    gate_logits: per layer ``[b * shard, experts]``. Returns ``[2 * experts + 1]`` in float32.
    """
    chosen = torch.zeros(num_experts, device=gate_logits[0].device)
    probability = torch.zeros_like(chosen)
    tokens = torch.zeros(1, device=chosen.device)
    for logits in gate_logits:
        weights = logits.float().softmax(dim=-1)
        mask = torch.ones(logits.shape[0], device=chosen.device)
        if attention_mask is not None:
            mask = attention_mask.reshape(-1).to(chosen)
        picks = weights.topk(top_k, dim=-1).indices.flatten()
        chosen = chosen.scatter_add(0, picks, mask.repeat_interleave(top_k))
        probability = probability + (weights * mask[:, None]).sum(dim=0)
        tokens = tokens + mask.sum()
    return torch.cat([chosen, probability, tokens])


def _loss(statistics: Tensor) -> Tensor:
    """Return equations 4 to 6 of Switch Transformer (arXiv 2101.03961)."""
    num_experts = statistics.shape[0] // 2
    chosen, probability = statistics[:num_experts], statistics[num_experts:-1]
    tokens = statistics[-1]
    return num_experts * (chosen / tokens * (probability / tokens)).sum()


class _SumOverGroup(torch.autograd.Function):
    """A sum over ranks forward and, since every rank's loss uses all of it, backward as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: SequenceParallel) -> Tensor:
        ctx.parallel = parallel
        total = x.clone()
        dist.all_reduce(total, group=parallel.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        total = grad_output.contiguous().clone()
        dist.all_reduce(total, group=ctx.parallel.group)
        return total, None
