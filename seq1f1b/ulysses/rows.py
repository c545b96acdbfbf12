"""Whole rows of a group's tokens: where documents lie, what is padding, and what may see what."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from seq1f1b.errors import Seq1F1BError


class LayoutError(Seq1F1BError, ValueError):
    """Positions, mask or cumulative lengths that describe no rows of documents."""


@dataclass(frozen=True)
class Pattern:
    """Which earlier tokens of its own document a token sees, itself included.

    window: only the last ``window`` tokens. chunk: only those in the same run of ``chunk`` tokens,
    counted from the document's first token.
    """

    window: int | None = None
    chunk: int | None = None


class Rows:
    """Whole rows ``[b, s]`` of one batch, kept on the CPU, where attention is planned.

    Every pattern here lets a token see one interval of its row, ``[first, own place]``, less
    padding in between; nothing of s x s elements is needed for that.

    positions: of each token. starts: place in the row of the first token of its document.
    is_real: False at padding; None where there is none.
    """

    def __init__(self, positions: Tensor, starts: Tensor, is_real: Tensor | None) -> None:
        self.positions, self.starts, self.is_real = positions, starts, is_real
        self._first: dict[tuple[Pattern, torch.device], Tensor] = {}
        self._costs: dict[Pattern, Tensor] = {}
        self._segments: dict[tuple[Pattern, int], list[tuple[int, int]]] = {}

    @classmethod
    def read(
        cls,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> "Rows":
        """Find documents in ``positions [b, s]``, ``attention_mask [b, s]`` and ``cu_seqlens``.

        A document begins where the position does not rise, or at a border of ``cu_seqlens``. Raises
        LayoutError where positions leave tokens out, which no document of whole tokens does.
        """
        positions = positions.detach().cpu().long()
        is_real = None
        if attention_mask is not None:
            is_real = attention_mask.detach().cpu().bool()
            if bool(is_real.all()):
                is_real = None
        if cu_seqlens is not None:
            begins = _begins_of_lengths(positions, cu_seqlens)
        else:
            begins = _begins_of_positions(positions, is_real)
        places = torch.arange(positions.shape[1]).expand_as(positions)
        starts = torch.where(begins, places, 0).cummax(dim=1).values
        return cls(positions, starts, is_real)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.positions.shape[1]

    @cached_property
    def is_alike(self) -> bool:
        """Whether documents and padding lie alike in all rows."""
        same = bool((self.starts == self.starts[:1]).all())
        return same and (self.is_real is None or bool((self.is_real == self.is_real[:1]).all()))

    @cached_property
    def has_holes(self) -> bool:
        """Whether padding lies within a document, so that an interval is not enough."""
        if self.is_real is None:
            return False
        at_start = self.is_real.gather(1, self.starts)
        return bool((self.is_real != at_start).any())

    @cached_property
    def num_documents(self) -> Tensor:
        """Documents of each row, without padding, ``[b]``."""
        begins = self.starts == torch.arange(self.length)
        return (begins & self.is_real if self.is_real is not None else begins).sum(dim=1)

    @cached_property
    def is_packed(self) -> Tensor:
        """Whether a row holds several documents, ``[b]``."""
        return self.num_documents > 1

    def first(self, pattern: Pattern, device: torch.device | str = "cpu") -> Tensor:
        """Return the place of the first token that each one may see, ``[b, s]``."""
        key = pattern, torch.device(device)
        if key not in self._first:
            self._first[key] = self._compute_first(pattern).to(device)
        return self._first[key]

    def _compute_first(self, pattern: Pattern) -> Tensor:
        places = torch.arange(self.length)
        first = self.starts
        if pattern.window is not None:
            first = torch.maximum(first, places - (pattern.window - 1))
        if pattern.chunk is not None:
            inside = (places - self.starts) % pattern.chunk
            first = torch.maximum(first, places - inside)
        return first

    def simplify(self, pattern: Pattern) -> Pattern:
        """Return the pattern without limits that no document here is long enough to feel."""
        longest = self.longest
        window, chunk = pattern.window, pattern.chunk
        return Pattern(
            None if window is None or window >= longest else window,
            None if chunk is None or chunk >= longest else chunk,
        )

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int((torch.arange(self.length) - self.starts).max()) + 1

    def segments(self, pattern: Pattern, row: int) -> list[tuple[int, int]]:
        """Return where the documents of a row, or their chunks, begin and end, without padding."""
        key = pattern, row
        if key not in self._segments:
            first = self.first(pattern)[row]
            begins = (first == torch.arange(self.length)).nonzero().flatten().tolist()
            found = pairwise([*begins, self.length])
            real = self.is_real
            self._segments[key] = [x for x in found if real is None or bool(real[row, x[0]])]
        return self._segments[key]

    def costs(self, pattern: Pattern) -> Tensor:
        """Return pairs of tokens computed for the first n tokens of all rows, n = 0 to s."""
        if pattern not in self._costs:
            pairs = torch.arange(1, self.length + 1) - self.first(pattern)
            self._costs[pattern] = torch.cat(
                [torch.zeros(1, dtype=torch.long), pairs.sum(dim=0).cumsum(0)]
            )
        return self._costs[pattern]


def _begins_of_positions(positions: Tensor, is_real: Tensor | None) -> Tensor:
    """Return where documents or runs of padding begin, ``[b, s]``."""
    b, s = positions.shape
    begins = torch.ones(b, s, dtype=torch.bool)
    if is_real is None:
        rise = positions[:, 1:] - positions[:, :-1]
        _check_rise(rise > 1)
        begins[:, 1:] = rise <= 0
        return begins
    # The last real token before each one, -1 where there is none.
    places = torch.arange(s).expand(b, s)
    last = torch.where(is_real, places, -1).cummax(dim=1).values
    last = torch.cat([torch.full((b, 1), -1), last[:, :-1]], dim=1)
    rise = positions - positions.gather(1, last.clamp(min=0))
    is_next = (last == places - 1) & is_real
    _check_rise((is_next & (rise > 1))[:, 1:])
    begins = is_real & ((last < 0) | (rise <= 0))
    return begins | _begins_of_outer_padding(is_real, begins)


def _begins_of_outer_padding(is_real: Tensor, begins: Tensor) -> Tensor:
    """Return where padding begins that no token of an open document follows.

    Such padding is kept apart from documents. Padding within a document stays a part of it.
    """
    b, s = is_real.shape
    places = torch.arange(s).expand(b, s)
    # What is the next real token, and does it begin a document?
    upcoming = torch.where(is_real, places, s).flip(1).cummin(dim=1).values.flip(1)
    padded = torch.cat([begins, torch.ones(b, 1, dtype=torch.bool)], dim=1)
    is_outer = ~is_real & padded.gather(1, upcoming)
    before = torch.cat([torch.zeros(b, 1, dtype=torch.bool), is_outer[:, :-1]], dim=1)
    return is_outer & ~before


def _begins_of_lengths(positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = cu_seqlens.detach().flatten().cpu().long()
    b, s = positions.shape
    rising = bool((bounds[1:] > bounds[:-1]).all())
    if b != 1 or bounds.numel() < 2 or bounds[0] != 0 or not rising or bounds[-1] > s:
        raise LayoutError(
            f"cu_seqlens must rise from 0 to at most the {s} tokens of the one row, not "
            f"{bounds.tolist()} for {b} row(s)"
        )
    begins = torch.zeros(1, s, dtype=torch.bool)
    begins[0, bounds[bounds < s]] = True
    return begins


def _check_rise(jumps: Tensor) -> None:
    """Raise LayoutError if a token but the first has a position behind the next one's."""
    if not bool(jumps.any()):
        return
    row, place = (int(x) for x in jumps.nonzero()[0])
    raise LayoutError(
        f"position_ids jump over tokens in row {row}, at token {place + 1}: neither the next token "
        f"of a document nor the first of another. Pass cu_seq_lens_q to say where documents begin"
    )
