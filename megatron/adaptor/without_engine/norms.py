"""Torch's norms under sequence parallelism, where Megatron has only those of apex."""

import copy
from collections.abc import Callable
from typing import Any

from megatron.adaptor.patches import Patch


def patches() -> list[Patch]:
    """Return what is replaced in Megatron's wrapper of torch's norms."""
    return [Patch("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", new_norm)]


def new_norm(
    original: Callable[..., Any], cls: type, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Provide sequence parallelism with norms where apex is missing.

    A norm works on each token by itself, so it needs no more than a mark on its weights, by which
    Megatron sums their gradients over the tensor-parallel ranks, each of which has some of the
    tokens.
    """
    if not config.sequence_parallel:
        return original(cls, config, *args, **kwargs)
    whole = copy.copy(config)
    whole.sequence_parallel = False
    norm = original(cls, whole, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = True
    return norm
