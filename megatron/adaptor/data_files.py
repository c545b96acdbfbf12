"""Megatron's indexed data sets, looked at before Megatron opens them.

Megatron maps both files into memory and believes them: a damaged index becomes a crash of the
interpreter or wrong tokens, and one of another data set trains without a word.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seq1f1b.errors import Seq1F1BError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = np.dtype([("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("indices", "<u8")])
# megatron.core.datasets.indexed_dataset.DType
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CHUNK = 1 << 20


class DataFileError(Seq1F1BError, ValueError):
    """A data set that cannot be read; the message names the file."""


@dataclass(frozen=True)
class DataFiles:
    """What an index says of its data set; a document may have several sequences, or none."""

    num_documents: int
    num_sequences: int
    num_tokens: int


def read_index(prefix: str | Path) -> DataFiles:
    """Read the index ``prefix``.idx and compare it with ``prefix``.bin.

    Raises:
        DataFileError: a file is missing or damaged, or they are not of one data set.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        index_bytes, token_bytes = index.stat().st_size, tokens.stat().st_size
        with index.open("rb") as stream:
            start = stream.read(len(_MAGIC) + _HEADER.itemsize)
    except OSError as error:
        raise DataFileError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if not start.startswith(_MAGIC):
        raise DataFileError(f"{index}: is no index of a data set")
    if len(start) < len(_MAGIC) + _HEADER.itemsize:
        raise DataFileError(f"{index}: is cut off")
    header = np.frombuffer(start, _HEADER, offset=len(_MAGIC))[0]
    version, code, sequences, indices = (int(value) for value in header)
    if version != _VERSION or code not in _DTYPES or indices < 1:
        raise DataFileError(f"{index}: is damaged, or of another version of the format")
    sizes = 4 * sequences + 8 * sequences + 8 * indices
    # images and texts have a byte of mode for each sequence at the end
    if index_bytes not in (len(start) + sizes, len(start) + sizes + sequences):
        raise DataFileError(
            f"{index}: has {index_bytes} bytes, and {len(start) + sizes} are what {sequences} "
            f"sequences of {indices - 1} documents take: it is cut off or damaged"
        )
    arrays = _arrays(index, len(start), sequences, indices)
    return _checked(index, tokens, token_bytes, np.dtype(_DTYPES[code]).itemsize, *arrays)


def _arrays(index: Path, start: int, sequences: int, indices: int) -> tuple[Any, Any, Any]:
    """Map lengths, pointers and the documents' first sequences."""
    found: list[Any] = []
    for code, count in (("<i4", sequences), ("<i8", sequences), ("<i8", indices)):
        dtype = np.dtype(code)
        if count:
            found.append(np.memmap(index, dtype, "r", start, (count,)))
        else:
            found.append(np.empty(0, dtype))
        start += count * dtype.itemsize
    return found[0], found[1], found[2]


def _checked(
    index: Path,
    tokens: Path,
    token_bytes: int,
    itemsize: int,
    lengths: Any,
    pointers: Any,
    firsts: Any,
) -> DataFiles:
    total = 0
    for place in range(0, len(lengths), _CHUNK):
        part = lengths[place : place + _CHUNK].astype(np.int64)
        ends = total + np.cumsum(part)
        starts = (ends - part) * itemsize
        if (part < 0).any() or (starts != pointers[place : place + _CHUNK]).any():
            raise DataFileError(f"{index}: is damaged: lengths and places of sequences disagree")
        total = int(ends[-1])
    if total == 0:
        raise DataFileError(f"{index}: there is no token in this data set")
    if total * itemsize != token_bytes:
        raise DataFileError(
            f"{tokens}: has {token_bytes} bytes, and {index.name} says {total * itemsize}: one of "
            "them is damaged, or of another data set"
        )
    if firsts[0] != 0 or firsts[-1] != len(lengths):
        raise DataFileError(f"{index}: is damaged: documents do not cover the sequences")
    for place in range(0, len(firsts), _CHUNK):
        if (np.diff(firsts[place : place + _CHUNK + 1]) < 0).any():
            raise DataFileError(f"{index}: is damaged: documents are not in order")
    return DataFiles(len(firsts) - 1, len(lengths), total)
