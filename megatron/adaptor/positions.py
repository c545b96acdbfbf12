"""Rotary positions of a sub-sequence start where the one before it ended."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from seq1f1b.runtime import ExecutionContext


def rotary_offset(context: ExecutionContext) -> Callable[[Callable[..., Any]], Any]:
    """Make the replacement of a rotary embedding's ``forward``, which already takes an offset."""

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, max_seq_len: int, offset: int = 0, *args: Any, **kwargs: Any) -> Any:
            return original(self, max_seq_len, offset + context.offset, *args, **kwargs)

        # YaRN's constructor empties the cache of what it takes for the upstream method.
        forward.cache_clear = original.cache_clear  # type: ignore[attr-defined]
        return forward

    return replacement


def cached_rotary_offset(context: ExecutionContext) -> Callable[[Callable[..., Any]], Any]:
    """Make the replacement of ``YarnRotaryEmbedding.get_cached_cos_sin``.

    Its cache holds one offset, which it cannot know to be the running sub-sequence's.
    """

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_cached_cos_sin(
            self: Any, seq_len: int, offset: int = 0, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if context.offset:
                self.max_seq_len_cached = 0
            cosine, sine = original(self, seq_len, offset, *args, **kwargs)
            if context.offset:
                self.max_seq_len_cached = 0
            return cosine, sine

        return get_cached_cos_sin

    return replacement
