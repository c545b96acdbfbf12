"""Auxiliary losses of a mixture of experts, exact for micro-batches that come in sub-sequences.

The load-balancing loss of a micro-batch of T tokens (arXiv 2101.03961, equations 4 to 6) is

    coefficient * E / (k T^2) * sum over experts e of  tokens_e * probs_e

where tokens_e counts the tokens that the router sends to e, probs_e adds the probabilities of e
over all tokens, and k is how many experts a token goes to. It is no sum over sub-sequences. But its
gradient is linear in what a sub-sequence adds to probs_e, with tokens_e as the slope, and when the
first backward of a micro-batch comes, all of its forwards are done and tokens_e is known. So every
sub-sequence gets the exact gradient; the value is logged with the last one's.

The router's z-loss is a mean over tokens, to which each sub-sequence adds its share. Tokens that a
padding mask leaves out count in neither.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.adaptor.patches import Patch
from seq1f1b.runtime import ExecutionContext
from seq1f1b.schedule import Kind

_MOE = "megatron.core.transformer.moe"
_ROUTER = f"{_MOE}.router:TopKRouter"


class _Balance:
    """What the sub-sequences of one micro-batch have brought to one loss of one router.

    Kept by sub-sequence, so that a recomputed forward counts once. tokens, probs: by expert.
    totals: tokens that all ranks of the router's group have. own: tokens that this rank has.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, Tensor] = {}
        self.probs: dict[int, Tensor] = {}
        self.totals: dict[int, Any] = {}
        self.own: dict[int, Any] = {}

    def slope(self, factor: float) -> Tensor:
        """Return the derivative of the loss by probs_e, ``[experts]``."""
        total = _at_least_one(sum(self.totals.values()))
        return sum(self.tokens.values()) * (factor / (total * total))

    def value(self, factor: float) -> Tensor:
        """Return the loss of all sub-sequences so far."""
        return (self.slope(factor) * sum(self.probs.values())).sum()


class _ZLoss:
    """Means and numbers of tokens of the sub-sequences of one micro-batch, for one router."""

    def __init__(self) -> None:
        self.means: dict[int, Tensor] = {}
        self.counts: dict[int, Any] = {}

    @property
    def total(self) -> Any:
        """Tokens that count in the whole micro-batch, or so far."""
        return _at_least_one(sum(self.counts.values()))

    def value(self) -> Tensor:
        """Return the mean over all sub-sequences so far."""
        return sum(self.means[j] * self.counts[j] for j in self.means) / self.total


class RouterLosses:
    """Replaces the losses that routers add, while sub-sequences run."""

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        self._router: Any = None
        self._loss = ""
        self._balances: dict[Any, _Balance] = {}
        self._z_losses: dict[Any, _ZLoss] = {}
        self._calls: set[Any] = set()

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's routers."""
        return [
            Patch(f"{_ROUTER}.routing", self.routing),
            Patch(f"{_ROUTER}._apply_aux_loss", self.apply_aux_loss),
            Patch(f"{_ROUTER}._apply_seq_aux_loss", self.apply_seq_aux_loss),
            Patch(f"{_ROUTER}.apply_z_loss", self.apply_z_loss),
            Patch(f"{_ROUTER}.attach_and_log_load_balancing_loss", self.attach),
            Patch(f"{_MOE}.moe_utils:switch_load_balancing_loss_func", self.balance),
            Patch(f"{_MOE}.moe_utils:z_loss_func", self.z_loss),
        ]

    def forget(self) -> None:
        """A new step begins."""
        self._balances.clear()
        self._z_losses.clear()
        self._calls.clear()

    def routing(
        self,
        original: Callable[..., Any],
        router: Any,
        logits: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Any:
        """Count tokens for auxiliary losses also where the backward will recompute the forward.

        Routers leave their losses out while gradients are off. That would be too late for the
        counts of all sub-sequences.
        """
        is_first_pass = router.training and self._runs_cut_forward
        if not is_first_pass or torch.is_grad_enabled():
            return original(router, logits, padding_mask)
        bias_counts = getattr(router, "local_tokens_per_expert", None)
        before = None if bias_counts is None else bias_counts.clone()
        with torch.enable_grad():
            results = original(router, logits.detach(), padding_mask)
        if bias_counts is not None and before is not None:  # the recomputation counts them
            bias_counts.copy_(before)
        return tuple(result.detach() for result in results)

    def apply_aux_loss(
        self, original: Callable[..., Any], router: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Keep the load-balancing loss of sub-sequences exact: tell whose it is."""
        return self._for_loss("aux_loss", original, router, *args, **kwargs)

    def apply_seq_aux_loss(
        self, original: Callable[..., Any], router: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Keep the sequence-level balancing loss of sub-sequences exact: tell whose it is."""
        return self._for_loss("seq_aux_loss", original, router, *args, **kwargs)

    def apply_z_loss(
        self,
        original: Callable[..., Any],
        router: Any,
        logits: Tensor,
        padding_mask: Tensor | None = None,
    ) -> Any:
        """Keep the z-loss of sub-sequences exact: tell whose it is."""
        if padding_mask is not None and router.config.moe_z_loss_coeff is not None:
            self._check_padding(router, "--moe-z-loss-coeff", exact=router.calculate_per_token_loss)
        return self._for_loss("z_loss", original, router, logits, padding_mask)

    def attach(
        self,
        original: Callable[..., Any],
        router: Any,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        needs_dp_avg: bool = True,
        valid_token_count: Any = None,
    ) -> Any:
        """Multiply by the micro-batch's tokens, not by a sub-sequence's, under per-token loss."""
        part = self._context.cut_part
        if part is not None and router.calculate_per_token_loss:
            count = activation.shape[0] if valid_token_count is None else valid_token_count
            self._balance_of_running().own[part.index] = count
            valid_token_count = 1  # ``balance`` multiplies, when all are counted
        return original(
            router,
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            needs_dp_avg=needs_dp_avg,
            valid_token_count=valid_token_count,
        )

    def balance(
        self,
        original: Callable[..., Any],
        probs: Tensor,
        tokens_per_expert: Tensor,
        total_num_tokens: Any,
        topk: int,
        num_experts: int,
        moe_aux_loss_coeff: float,
        **kwargs: Any,
    ) -> Tensor:
        """Keep the balancing loss of sub-sequences exact: that of the whole micro-batch."""
        part = self._context.cut_part
        if part is None:
            return original(
                probs,
                tokens_per_expert,
                total_num_tokens,
                topk,
                num_experts,
                moe_aux_loss_coeff,
                **kwargs,
            )
        router, balance = self._router, self._balance_of_running()
        self._check_first_call()
        balance.tokens[part.index] = tokens_per_expert.detach()
        balance.probs[part.index] = probs.detach().sum(dim=0)
        balance.totals[part.index] = total_num_tokens
        factor = num_experts * moe_aux_loss_coeff / topk
        logs = part.is_last and self._runs_cut_forward
        value = balance.value(factor) if logs else probs.new_zeros(())

        def slope() -> Tensor:
            own = sum(balance.own.values()) if router.calculate_per_token_loss else 1
            return balance.slope(factor) * own

        return _LinearInProbs.apply(probs, value, slope)

    def z_loss(
        self,
        original: Callable[..., Any],
        logits: Tensor,
        z_loss_coeff: float,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Keep the z-loss of sub-sequences exact: weigh it by their share of the tokens."""
        mean, part = (
            original(logits, z_loss_coeff, padding_mask=padding_mask),
            self._context.cut_part,
        )
        if part is None:
            return mean
        losses = self._z_losses.setdefault(self._owner, _ZLoss())
        self._check_first_call()
        count = logits.shape[0] if padding_mask is None else (~padding_mask).sum()
        losses.means[part.index], losses.counts[part.index] = mean.detach(), count
        logs = part.is_last and self._runs_cut_forward
        value = losses.value() if logs else torch.zeros_like(mean)
        if self._router.calculate_per_token_loss:  # Megatron multiplies by ``count``
            return _Valued.apply(mean, value, lambda: 1.0)
        return _Valued.apply(mean, value, lambda: count / losses.total)

    def _for_loss(
        self, loss: str, original: Callable[..., Any], router: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs.get("with_padding_mask") and router.calculate_per_token_loss:
            self._check_padding(router, "--moe-aux-loss-coeff", exact=False)
        self._router, self._loss = router, loss
        try:
            return original(router, *args, **kwargs)
        finally:
            self._router = None

    def _check_padding(self, router: Any, flag: str, *, exact: bool) -> None:
        """Refuse losses that Megatron weighs by the tokens of each rank: a cut changes those."""
        if self._context.cut_part is not None and router.tp_cp_group.size() > 1 and not exact:
            raise ValueError(
                f"{flag} with a padding mask depends on which rank has which token, under "
                "--sequence-parallel and --context-parallel-size: leave the padding mask out, or "
                "use --seq1f1b-splits 1"
            )

    def _check_first_call(self) -> None:
        """Refuse routers that a forward calls several times: each call would replace the last."""
        if not self._runs_cut_forward:
            return
        call = self._context.action, self._router, self._loss
        if call in self._calls:
            raise ValueError(
                "a router is called several times in the forward of a sub-sequence, and its losses "
                "are exact for one call only: let each layer have a router of its own and call it "
                "once (mlp_chunks_for_training 1), or use --seq1f1b-splits 1"
            )
        self._calls.add(call)

    @property
    def _owner(self) -> Any:
        action = self._context.action
        assert action is not None
        return action.chunk, action.micro_batch, self._router, self._loss

    def _balance_of_running(self) -> _Balance:
        return self._balances.setdefault(self._owner, _Balance())

    @property
    def _runs_cut_forward(self) -> bool:
        part, action = self._context.cut_part, self._context.action
        return part is not None and action is not None and action.kind is Kind.F


class _LinearInProbs(torch.autograd.Function):
    """Gives ``value`` forward; backward the micro-batch's gradient, whose slope is known then."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, value: Tensor, slope: Callable[[], Tensor]) -> Tensor:
        ctx.shape, ctx.dtype, ctx.slope = probs.shape, probs.dtype, slope
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        slope = (grad_output * ctx.slope()).to(ctx.dtype)
        return slope.expand(ctx.shape), None, None


class _Valued(torch.autograd.Function):
    """Gives ``value`` forward; backward multiplies by what ``factor`` returns then."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, factor: Callable[[], Any]) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output * ctx.factor(), None, None


def _at_least_one(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
