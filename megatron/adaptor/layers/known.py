"""Refuse layers in which a sub-sequence would not see the ones before it."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def check_layers(chunks: Iterable[nn.Module]) -> None:
    """Raise ValueError for a module that would mix tokens of one sub-sequence only, by its class.

    Those are attention that is not Megatron's, recurrent layers and convolutions.
    """
    unknown = sorted({type(m).__name__ for chunk in chunks for m in chunk.modules() if _mixes(m)})
    if unknown:
        raise ValueError(
            f"the model has layers that would not see earlier sub-sequences: {', '.join(unknown)}. "
            "Their attention must be Megatron's DotProductAttention or TEDotProductAttention, and "
            "they may have no recurrent state or convolution: use --seq1f1b-splits 1"
        )


def _mixes(module: nn.Module) -> bool:
    if type(module).__module__.startswith("megatron.core.ssm."):
        return True
    core = getattr(module, "core_attention", None)
    if core is not None and not isinstance(core, _replaced_attention()):
        return True
    return isinstance(module, nn.RNNBase | nn.modules.conv._ConvNd | nn.MultiheadAttention)


def _replaced_attention() -> tuple[Any, ...]:
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    engine = getattr(transformer_engine, "TEDotProductAttention", None)
    return (DotProductAttention, engine) if isinstance(engine, type) else (DotProductAttention,)
