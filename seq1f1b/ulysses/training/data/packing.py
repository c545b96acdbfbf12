"""Which documents share a row."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seq1f1b.ulysses.training.data.records import DataError


@dataclass(frozen=True)
class Piece:
    """Tokens ``[start, stop)`` of a document."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens of the piece."""
        return self.stop - self.start


Row = tuple[Piece, ...]


def make_rows(
    lengths: npt.NDArray[np.int64], max_length: int, packing: str, too_long: str
) -> list[Row]:
    """Return rows of at most ``max_length`` tokens; a pure function of its arguments.

    packing: "none" for a piece a row, "cut" for full rows that cut documents, "whole" for rows in
    which pieces are put where least room is left over (best fit, longest first). too_long: whether
    documents longer than a row are "cut" into pieces or "drop"ped.
    """
    pieces = [
        Piece(document, start, min(start + max_length, int(length)))
        for document, length in enumerate(lengths)
        if length <= max_length or too_long == "cut"
        for start in range(0, int(length), max_length)
    ]
    pieces = [piece for piece in pieces if piece.length > 1]
    if not pieces:
        raise DataError(
            f"no document is left of {len(lengths)}: data.max_length is {max_length} and "
            f"data.too_long {too_long}"
        )
    match packing:
        case "none":
            return [(piece,) for piece in pieces]
        case "cut":
            return _cut(lengths, max_length, {piece.document for piece in pieces})
        case _:
            return _best_fit(pieces, max_length)


def _cut(
    lengths: npt.NDArray[np.int64], max_length: int, chosen: Iterable[int]
) -> list[Row]:
    rows: list[Row] = []
    row: list[Piece] = []
    room = max_length
    for document in sorted(chosen):
        start, length = 0, int(lengths[document])
        while start < length:
            stop = min(start + room, length)
            row.append(Piece(document, start, stop))
            room -= stop - start
            start = stop
            if not room:
                rows.append(tuple(row))
                row, room = [], max_length
    if row:
        rows.append(tuple(row))
    return rows


def _best_fit(pieces: list[Piece], max_length: int) -> list[Row]:
    rows: list[list[Piece]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = np.zeros(max_length + 1, dtype=np.int64)  # how many rows have so much room
    for piece in sorted(pieces, key=lambda p: -p.length):
        fitting = np.flatnonzero(rooms[piece.length :])
        if len(fitting):
            room = int(fitting[0]) + piece.length
            index = by_room[room].pop()
            rooms[room] -= 1
        else:
            room, index = max_length, len(rows)
            rows.append([])
        rows[index].append(piece)
        by_room[room - piece.length].append(index)
        rooms[room - piece.length] += 1
    return [tuple(row) for row in rows]
