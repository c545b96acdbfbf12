"""Megatron's core attention, routed to the sub-sequence attention of the running action."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron.adaptor.patches import Patch
from megatron.adaptor.step.masks import CausalMasks, MaskError
from megatron.adaptor.step.shards import dealt
from seq1f1b.attention.token_heads import head_and_tail, to_heads, to_tokens
from seq1f1b.runtime import ExecutionContext

_LOCAL = "megatron.core.transformer.dot_product_attention:DotProductAttention"
_ENGINE = "megatron.core.extensions.transformer_engine:TEDotProductAttention"


class Attention:
    """Replaces the two core attentions of Megatron's layers.

    Megatron's local one builds the matrix of all scores. Where it would compute plain causal
    attention, the kernels of ``context`` do, on whole sequences too, so that schedules are compared
    with the same attention on both sides. Transformer Engine's keeps whole sequences.
    """

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        self._masks = CausalMasks()
        self.is_replaced = True

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's attention."""
        from megatron.core.extensions.transformer_engine import HAVE_TE

        engine = [Patch(f"{_ENGINE}.forward", self.engine_forward)] if HAVE_TE else []
        return [
            Patch(f"{_LOCAL}.__init__", local_init),
            Patch(f"{_LOCAL}.forward", self.local_forward),
            *engine,
        ]

    def forget_masks(self) -> None:
        """Let go of the mask that was checked last."""
        self._masks.forget()

    def local_forward(
        self,
        original: Callable[..., Tensor],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend to earlier sub-sequences, with flash kernels instead of the full matrix."""
        obstacle = _obstacle(module, attn_mask_type, attention_bias, packed_seq_params)
        mask = attention_mask
        if obstacle is None and mask is not None and not self._is_causal(mask, query, key):
            within = " within each document" if self._context.running_documents else ""
            obstacle = f"its attention mask of shape {list(mask.shape)} is not causal{within}"
        if obstacle is None and self._computes(module):
            return self._attend(module, query, key, value, _local_scale(module))
        if obstacle is not None and self._needs_context:
            raise MaskError(f"layer {module.layer_number}: {obstacle}; {self._way_out}")
        return original(
            module,
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )

    def engine_forward(
        self,
        original: Callable[..., Tensor],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend to earlier sub-sequences; whole sequences stay with Transformer Engine."""
        if self._needs_context:
            obstacle = _obstacle(module, attn_mask_type, attention_bias, packed_seq_params)
            if obstacle:
                raise MaskError(f"layer {module.layer_number}: {obstacle}; {self._way_out}")
            scale = getattr(module, "softmax_scale", None) or query.shape[-1] ** -0.5
            return self._attend(module, query, key, value, scale)
        return original(
            module,
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    @property
    def _needs_context(self) -> bool:
        """Whether the running action works on less than a micro-batch, or on packed documents."""
        context = self._context
        return context.cut_part is not None or (
            context.part is not None and context.documents is not None
        )

    @property
    def _way_out(self) -> str:
        if self._context.cut_part is not None:
            return "sub-sequences attend causally only: use --seq1f1b-splits 1"
        return "packed documents attend causally only, each by itself: leave it out"

    def _computes(self, module: Any) -> bool:
        """Whether plain causal attention is ours to compute."""
        exchanges = module.config.context_parallel_size > 1  # Megatron's local one cannot
        return self.is_replaced or self._needs_context or exchanges

    def _is_causal(self, mask: Tensor, query: Tensor, key: Tensor) -> bool:
        """Whether ``mask`` is what a causal kernel computes by.

        While packed documents run, it has to be causal within each.
        """
        group = parallel_state.get_context_parallel_group()
        num_ranks = 1 if group is None else group.size()
        size = query.shape[0], key.shape[0] * num_ranks
        if tuple(mask.shape[-2:]) != size:
            return False
        positions = None
        if num_ranks > 1:
            positions = dealt(torch.arange(size[1], device=mask.device), num_ranks)[group.rank()]
        return self._masks.is_causal(mask, positions, self._context.running_documents)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attend with this rank's share of the heads; return ``[n, b, heads * v dim]``."""
        attend = self._context.attend
        if module.config.context_parallel_size == 1:
            return attend(module, query, key, value, scale).flatten(2)
        group = parallel_state.get_context_parallel_group()
        query, key, value = (
            to_heads(group, tensor, head_and_tail) for tensor in (query, key, value)
        )
        return to_tokens(group, attend(module, query, key, value, scale), head_and_tail).flatten(2)


def local_init(
    original: Callable[..., None],
    module: Any,
    config: Any,
    *args: Any,
    k_channels: int | None = None,
    v_channels: int | None = None,
    **kwargs: Any,
) -> None:
    """Accept the head sizes of multi-latent attention, and context parallelism through all-to-all.

    Of the head sizes the forward needs only that of a value, to give its output the right shape.
    """
    kinds = config.cp_comm_type
    exchanges = set([kinds] if isinstance(kinds, str) else kinds or ()) == {"a2a"}
    original(module, _on_one_rank(config) if exchanges else config, *args, **kwargs)
    module.config = config
    if v_channels is not None:
        module.hidden_size_per_attention_head = k_channels
        module.hidden_size_per_partition = v_channels * module.num_attention_heads_per_partition


def _on_one_rank(config: Any) -> Any:
    alone = copy.copy(config)
    alone.context_parallel_size = 1
    return alone


def _obstacle(
    module: Any, attn_mask_type: Any, attention_bias: Tensor | None, packed_seq_params: Any
) -> str | None:
    """Return why this call is not plain causal attention; None if it is."""
    config = module.config
    mask_type = attn_mask_type or getattr(module, "attn_mask_type", AttnMaskType.causal)
    dropout = getattr(module, "attention_dropout", None)
    if mask_type is not AttnMaskType.causal:
        return f"its attention has mask type {mask_type.name}"
    if attention_bias is not None:
        return "its attention has a bias"
    if packed_seq_params is not None:
        return "it got packed sequences"
    if module.training and getattr(dropout, "p", dropout or 0.0) > 0.0:
        return "it has attention dropout (--attention-dropout 0 turns it off)"
    if config.window_size is not None or config.softmax_type != "vanilla":
        return "its attention has a window or softmax offsets"
    return None


def _local_scale(module: Any) -> float:
    """Undo the layer scaling that the local softmax would multiply back."""
    if module.config.apply_query_key_layer_scaling:
        return module.softmax_scale * module.layer_number
    return module.softmax_scale
