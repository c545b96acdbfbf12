"""Megatron's core attention, routed to the sub-sequence attention of the running action."""

import copy
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from megatron.adaptor.context_parallel import to_heads, to_tokens
from seq1f1b.runtime import ExecutionContext


def local_attention(
    context: ExecutionContext, masks_count: Callable[[], bool] = lambda: False
) -> Callable[[Callable[..., Tensor]], Any]:
    """Make the replacement of ``DotProductAttention.forward``.

    Its own way builds the matrix of all scores. Where it would compute plain causal attention, the
    flash kernels of ``context`` do, on whole sequences too, so that schedules are compared with the
    same attention on both sides. Anything else goes to Megatron unless the executor must do it.
    ``masks_count`` says whether masks are more than causal where the executor does not run.
    """

    def replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(
            self: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any = None,
            attention_bias: Tensor | None = None,
            packed_seq_params: Any = None,
        ) -> Tensor:
            obstacle = _obstacle(self, attn_mask_type, attention_bias, packed_seq_params)
            needs_mask = attention_mask is not None and context.action is None and masks_count()
            if obstacle is None and not needs_mask:
                return _attend(context, self, query, key, value, _local_scale(self))
            if obstacle is not None and needs_context(context):
                raise ValueError(f"layer {self.layer_number}: {obstacle}")
            return original(
                self,
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
            )

        return forward

    return replacement


def local_attention_init(original: Callable[..., None]) -> Callable[..., None]:
    """Let ``DotProductAttention.__init__`` take what ``local_attention`` can do beyond Megatron's.

    That is context parallelism through all-to-all, and the head sizes of multi-latent attention, of
    which the forward needs only the size of a value, to give its output the right shape.
    """

    def __init__(
        self: Any,
        config: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        kinds = config.cp_comm_type
        exchanges = set([kinds] if isinstance(kinds, str) else kinds or ()) == {"a2a"}
        original(self, _on_one_rank(config) if exchanges else config, *args, **kwargs)
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return __init__


def transformer_engine_attention(
    context: ExecutionContext,
) -> Callable[[Callable[..., Tensor]], Any]:
    """Make the replacement of ``TEDotProductAttention.forward``: only sub-sequences leave it."""

    def replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(
            self: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any,
            attention_bias: Tensor | None = None,
            packed_seq_params: Any = None,
            **kwargs: Any,
        ) -> Tensor:
            if needs_context(context):
                obstacle = _obstacle(self, attn_mask_type, attention_bias, packed_seq_params)
                if obstacle:
                    raise ValueError(obstacle)
                scale = getattr(self, "softmax_scale", None) or query.shape[-1] ** -0.5
                return _attend(context, self, query, key, value, scale)
            return original(
                self,
                query,
                key,
                value,
                attention_mask,
                attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )

        return forward

    return replacement


def _on_one_rank(config: Any) -> Any:
    alone = copy.copy(config)
    alone.context_parallel_size = 1
    return alone


def _attend(
    context: ExecutionContext, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attend with this rank's share of the heads; return ``[n, b, heads * v dim]``."""
    if module.config.context_parallel_size == 1:
        return context.attend(module, query, key, value, scale).flatten(2)
    group = parallel_state.get_context_parallel_group()
    query, key, value = (to_heads(group, tensor) for tensor in (query, key, value))
    return to_tokens(group, context.attend(module, query, key, value, scale)).flatten(2)


def needs_context(context: ExecutionContext) -> bool:
    """Whether the running action works on less than a whole micro-batch, or on packed documents."""
    is_packed = context.part is not None and context.documents is not None
    return is_packed or context.cut_part is not None


def _obstacle(
    module: Any, attn_mask_type: Any, attention_bias: Tensor | None, packed_seq_params: Any
) -> str | None:
    """Return why this call is not plain causal attention; None if it is."""
    from megatron.core.transformer.enums import AttnMaskType

    config = module.config
    mask_type = attn_mask_type or getattr(module, "attn_mask_type", AttnMaskType.causal)
    dropout = getattr(module, "attention_dropout", None)
    if mask_type is not AttnMaskType.causal:
        return f"attention with mask type {mask_type.name} cannot run on sub-sequences"
    if attention_bias is not None:
        return "attention with a bias cannot run on sub-sequences"
    if packed_seq_params is not None:
        return "packed sequences cannot run on sub-sequences"
    if module.training and getattr(dropout, "p", dropout or 0.0) > 0.0:
        return "attention dropout cannot run on sub-sequences: --attention-dropout 0"
    if config.window_size is not None or config.softmax_type != "vanilla":
        return "windowed attention and softmax offsets cannot run on sub-sequences"
    return None


def _local_scale(module: Any) -> float:
    """Undo the layer scaling that the local softmax would multiply back."""
    if module.config.apply_query_key_layer_scaling:
        return module.softmax_scale * module.layer_number
    return module.softmax_scale
