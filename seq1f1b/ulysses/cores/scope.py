"""What one call of an attention core computes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from seq1f1b.ulysses.rows import Pattern, Rows


@dataclass(frozen=True)
class Options:
    """How scores become weights.

    scale: multiplies the products of queries and keys. softcap: c in ``c * tanh(score / c)``.
    dropout: the share of weights set to 0, chosen by ``seed``.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Segment:
    """Rows whose tokens see all of the segment up to themselves: a document or a chunk.

    Places in the row: of its first token, and of its queries ``[start, stop)`` in this call.
    """

    first: int
    start: int
    stop: int


@dataclass(frozen=True)
class Scope:
    """Queries at ``[start, stop)`` of every row, and keys at ``[key_start, stop)``."""

    rows: Rows
    pattern: Pattern
    start: int
    stop: int
    key_start: int

    @property
    def num_queries(self) -> int:
        """Queries of a row."""
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        """Keys of a row."""
        return self.stop - self.key_start

    def first(self, device: torch.device | str) -> Tensor:
        """Return the first key that each query sees, ``[b, queries]``, counted from key_start."""
        return self.rows.first(self.pattern, device)[:, self.start : self.stop] - self.key_start

    def is_real_key(self, device: torch.device) -> Tensor | None:
        """Return which keys are no padding, ``[b, keys]``; None where intervals leave it out."""
        if not self.rows.has_holes or self.rows.is_real is None:
            return None
        return self.rows.is_real[:, self.key_start : self.stop].to(device)

    def segments(self, row: int) -> list[Segment]:
        """Return the segments of a row that have queries in this call, padding left out."""
        return [
            Segment(first, max(first, self.start), min(end, self.stop))
            for first, end in self.rows.segments(self.pattern, row)
            if first < self.stop and end > self.start
        ]
