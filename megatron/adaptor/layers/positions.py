"""Rotary positions of a sub-sequence start where the one before it ended."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron.adaptor.patches import Patch
from seq1f1b.runtime import ExecutionContext

_EMBEDDINGS = "megatron.core.models.common.embeddings"
_YARN = f"{_EMBEDDINGS}.yarn_rotary_pos_embedding:YarnRotaryEmbedding"


class Positions:
    """Shifts positions by the offset of the running sub-sequence."""

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's rotary embeddings."""
        return [
            Patch(f"{_EMBEDDINGS}.rotary_pos_embedding:RotaryEmbedding.forward", self.forward),
            Patch(f"{_YARN}.forward", self.forward),
            Patch(f"{_YARN}.get_cached_cos_sin", self.cached_cosines),
        ]

    def forward(
        self,
        original: Callable[..., Any],
        embedding: Any,
        max_seq_len: int,
        offset: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Start the rotary positions of a sub-sequence at its offset."""
        return original(embedding, max_seq_len, offset + self._context.offset, *args, **kwargs)

    def cached_cosines(
        self,
        original: Callable[..., Any],
        embedding: Any,
        seq_len: int,
        offset: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Keep no cosines of one sub-sequence for another: the cache holds one offset."""
        if self._context.offset:
            embedding.max_seq_len_cached = 0
        cosine, sine = original(embedding, seq_len, offset, *args, **kwargs)
        if self._context.offset:
            embedding.max_seq_len_cached = 0
        return cosine, sine
