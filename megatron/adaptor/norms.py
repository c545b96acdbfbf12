"""Torch's norms under sequence parallelism, where Megatron has only those of apex."""

import copy
from collections.abc import Callable
from typing import Any


def sequence_parallel_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``WrappedTorchNorm.__new__`` that marks weights as sequence parallel.

    A norm works on each token by itself, so it needs no more than the mark, by which Megatron sums
    the weights' gradients over the tensor-parallel ranks, each of which has some of the tokens.
    """

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = original(cls, whole, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return new
