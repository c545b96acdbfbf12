"""One of the parts that a micro-batch's sequence is cut into."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SubSequence:
    """Tokens ``[start, stop)`` of a sequence of ``total`` tokens; ``index`` counts from 0."""

    index: int
    start: int
    stop: int
    total: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the micro-batch's sequence."""
        return self.length == self.total

    @property
    def is_last(self) -> bool:
        """Whether no sub-sequence follows in this micro-batch."""
        return self.stop == self.total


def sub_sequences(lengths: Iterable[int]) -> tuple[SubSequence, ...]:
    """Place ``lengths`` one behind the other, as sub-sequences of their sum."""
    lengths = tuple(lengths)
    total = sum(lengths)
    parts = []
    start = 0
    for index, length in enumerate(lengths):
        parts.append(SubSequence(index, start, start + length, total))
        start += length
    return tuple(parts)
