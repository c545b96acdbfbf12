"""Documents packed into one sequence, and what a sequence cut into sub-sequences makes of them."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from seq1f1b.sequence.sub_sequence import SubSequence


@dataclass(frozen=True)
class Documents:
    """Documents that lie one behind the other and fill a sequence.

    starts: the position of each one's first token, ascending from 0. total: the sequence's length.
    Raises ValueError when these are no such positions.
    """

    starts: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        ends = (*self.starts, self.total)
        if ends[0] != 0 or any(after <= before for before, after in pairwise(ends)):
            raise ValueError(
                f"documents start at ascending positions from 0 to below {self.total}, "
                f"not at {list(self.starts)}"
            )

    @classmethod
    def of_lengths(cls, lengths: Iterable[int]) -> "Documents":
        """Place documents of ``lengths`` tokens one behind the other."""
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + length)
        return cls(tuple(ends[:-1]), ends[-1])

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The position behind each document's last token."""
        return (*self.starts[1:], self.total)

    def at(self, position: int) -> int:
        """Return the number of the document that the token at ``position`` belongs to."""
        return bisect_right(self.starts, position) - 1

    def pieces(self, part: SubSequence) -> list[tuple[int, SubSequence]]:
        """Return the number of every document in ``part`` and which of its tokens lie there.

        Positions of a piece count from the start of its document: a piece whose ``length`` is its
        ``total`` is a whole document, any other belongs to a document that a cut runs through.
        """
        pieces = []
        for number in range(self.at(part.start), self.at(part.stop - 1) + 1):
            first, end = self.starts[number], self.ends[number]
            inside = max(part.start, first) - first, min(part.stop, end) - first
            pieces.append((number, SubSequence(part.index, *inside, end - first)))
        return pieces

    def carried(self, parts: Sequence[SubSequence]) -> int:
        """Return how many tokens' keys and values cross from one of ``parts`` to another.

        A document that a cut runs through is carried whole, as its last tokens attend to all of it;
        documents that lie within one sub-sequence are not carried at all.
        """
        cut = {self.at(part.start) for part in parts if part.start not in self.starts}
        return sum(self.ends[number] - self.starts[number] for number in cut)
