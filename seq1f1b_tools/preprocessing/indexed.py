"""Megatron's indexed dataset, written without importing Megatron (which takes seconds).

The .bin file is every sequence's tokens, one after the other. The .idx file is, little-endian:

    9 bytes             magic "MMIDIDX" and two zero bytes
    uint64              version, 1
    uint8               the code of the tokens' dtype
    uint64              number of sequences
    uint64              number of document indices: documents + 1
    int32  [sequences]  tokens of each sequence
    int64  [sequences]  where each sequence starts in the .bin file, in bytes
    int64  [documents + 1]  the sequence at which each document starts, and the end

Source: `megatron.core.datasets.indexed_dataset` of Megatron-Core 0.19.2; the tests compare bytes.
"""

import os
import secrets
import shutil
import struct
from array import array
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from seq1f1b_tools.preprocessing.errors import SettingError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPE_CODES = {"int32": 4, "uint16": 8}
_MAX_UINT16_VOCAB_SIZE = 65499

Tokens = np.ndarray[Any, np.dtype[Any]]


class EncodedDocuments(NamedTuple):
    """Documents of one batch and one key, tokenized."""

    tokens: Tokens  # [all tokens]
    lengths: list[int]  # tokens of each sequence
    num_sequences: list[int]  # sequences of each document


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrower of the two dtypes that Megatron stores tokens in, for ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= _MAX_UINT16_VOCAB_SIZE else "<i4")


class _Part:
    """The documents of one partition, as they come in."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lengths = array("i")
        self.num_sequences = array("q")
        self.file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by the writer

    def add(self, tokens: Tokens, lengths: Sequence[int], num_sequences: Sequence[int]) -> None:
        self.file.write(tokens.tobytes())
        self.lengths.extend(lengths)
        self.num_sequences.extend(num_sequences)


class IndexedWriter:
    """One .bin/.idx pair, written beside its final name until `publish`.

    Args:
        prefix: path of the pair without suffix.
        dtype: of the stored tokens, from `token_dtype`.
        num_partitions: documents are dealt to this many partitions in turn, and the partitions
            follow one another in the pair: the order that upstream's tool gives them.

    Raises:
        SettingError: the folder cannot be written to.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any], num_partitions: int = 1) -> None:
        self.bin_path, self.idx_path = f"{prefix}.bin", f"{prefix}.idx"
        self.dtype = dtype
        self.num_documents = 0
        self.num_tokens = 0
        self._suffix = f".{secrets.token_hex(4)}.tmp"
        self._parts: list[_Part] = []
        try:
            os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
            for path in (self.bin_path, self.idx_path):
                if os.path.isdir(path):
                    raise IsADirectoryError(0, "it is a folder", path)
            for number in range(num_partitions):
                name = f"{self.bin_path}.{number}" if number else self.bin_path
                self._parts.append(_Part(name + self._suffix))
        except OSError as error:
            self.discard()
            raise SettingError(
                f"--output-prefix: {error.filename or prefix} cannot be written: {error.strerror}"
            ) from error

    def add(self, documents: EncodedDocuments) -> None:
        """Append documents; one without sequences keeps its (empty) place in the index."""
        if len(self._parts) == 1:
            self._parts[0].add(*documents)
        else:
            self._deal(documents)
        self.num_documents += len(documents.num_sequences)
        self.num_tokens += len(documents.tokens)

    def _deal(self, documents: EncodedDocuments) -> None:
        sequence = token = 0
        for number, count in enumerate(documents.num_sequences, start=self.num_documents):
            lengths = documents.lengths[sequence : sequence + count]
            num_tokens = sum(lengths)
            part = self._parts[number % len(self._parts)]
            part.add(documents.tokens[token : token + num_tokens], lengths, [count])
            sequence += count
            token += num_tokens

    def finish(self) -> None:
        """Put the partitions together and write the index, still beside the final names."""
        first, *others = self._parts
        for part in others:
            part.file.close()
            with open(part.path, "rb") as file:
                shutil.copyfileobj(file, first.file, 1 << 20)
            os.unlink(part.path)
        first.file.close()
        lengths = np.concatenate([np.asarray(part.lengths, dtype="<i4") for part in self._parts])
        counts = np.concatenate([np.asarray(p.num_sequences, dtype="<i8") for p in self._parts])
        starts = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], out=starts[1:])
        boundaries = np.zeros(len(counts) + 1, dtype="<i8")
        np.cumsum(counts, out=boundaries[1:])
        with open(self.idx_path + self._suffix, "xb") as file:
            file.write(_MAGIC)
            code = _DTYPE_CODES[self.dtype.name]
            file.write(struct.pack("<QBQQ", _VERSION, code, len(lengths), len(boundaries)))
            for block in (lengths, starts * self.dtype.itemsize, boundaries):
                file.write(block.tobytes())

    def publish(self) -> None:
        """Rename the pair to its final names; an index never lies beside another run's tokens."""
        if os.path.exists(self.idx_path):
            os.unlink(self.idx_path)
        os.replace(self.bin_path + self._suffix, self.bin_path)
        os.replace(self.idx_path + self._suffix, self.idx_path)

    def discard(self) -> None:
        """Remove whatever was written and not published."""
        for part in self._parts:
            part.file.close()
        for path in [part.path for part in self._parts] + [self.idx_path + self._suffix]:
            if os.path.exists(path):
                os.unlink(path)
