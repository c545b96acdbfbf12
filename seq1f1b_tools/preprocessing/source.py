"""JSON lines or tables in, batches of texts out; errors name file and line."""

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from seq1f1b.errors import Seq1F1BError
from seq1f1b_tools.preprocessing.errors import DataError
from seq1f1b_tools.preprocessing.inputs import is_pipe
from seq1f1b_tools.preprocessing.unpack import Counted, kind_of, lines_of, rows_of

_NUM_SKIPS_SHOWN = 5
_READ_BYTES = 1 << 16

Document = list[list[str]]
"""The texts of one document: for each key, its sentences (one text where it is not a list)."""


@dataclass(slots=True)
class Batch:
    """Documents that are tokenized together."""

    documents: list[Document] = field(default_factory=list)
    num_bytes: int = 0  # of JSON text, unpacked
    position: int = 0  # bytes of the input files, as they lie on disk, read so far
    first_line: str = ""  # file:line
    last_line: str = ""


class BadLineError(Seq1F1BError, ValueError):
    """One line that holds no usable document."""


def parse_line(line: bytes, keys: Sequence[str]) -> Document:
    """The texts under `keys` of one JSON line.

    Raises:
        BadLineError: the line is not a JSON object, lacks a key, or holds something else than text.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadLineError(f"holds a JSON {type(row).__name__}, not an object")
    return texts_of(row, keys)


def texts_of(row: dict[str, Any], keys: Sequence[str]) -> Document:
    """The texts under `keys` of one row; raises BadLineError as `parse_line` does."""
    return [_texts_of(row, key) for key in keys]


def _texts_of(row: dict[str, Any], key: str) -> list[str]:
    if key not in row:
        raise BadLineError(f"has no key {key!r} (--json-keys); its keys are {', '.join(row)}")
    value = row[key]
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise BadLineError(f"key {key!r} holds {type(text).__name__}, not text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadLineError(
                f"key {key!r} holds half a surrogate pair at character {error.start}"
            ) from error
    return texts


class JsonLines:
    """Batches of documents from JSON-lines files, in order.

    Args:
        files: paths; what is compressed is unpacked on the way.
        keys: the keys whose texts are wanted.
        skip_bad_lines: count a bad line and go on, instead of stopping at it.
        batch_documents: documents in a batch; 0 for as many as `batch_bytes` hold.
        batch_bytes: bytes of JSON text in a batch where `batch_documents` is 0.
    """

    def __init__(
        self,
        files: Sequence[str],
        keys: Sequence[str],
        skip_bad_lines: bool,
        batch_documents: int,
        batch_bytes: int,
    ) -> None:
        self.files = files
        self.keys = keys
        self.skip_bad_lines = skip_bad_lines
        self.batch_documents = batch_documents
        self.batch_bytes = batch_bytes
        self.total_bytes = sum(os.path.getsize(file) for file in files if not is_pipe(file))
        self.num_skipped = 0

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            DataError: a bad line where none is to be skipped, or a file that cannot be read.
        """
        batch = Batch()
        for where, num_bytes, document, position in self._documents():
            batch.documents.append(document)
            batch.num_bytes += num_bytes
            batch.position = position
            batch.first_line = batch.first_line or where
            batch.last_line = where
            if self._is_full(batch):
                yield batch
                batch = Batch()
        if batch.documents:
            yield batch

    def _is_full(self, batch: Batch) -> bool:
        if self.batch_documents:
            return len(batch.documents) >= self.batch_documents
        return batch.num_bytes >= self.batch_bytes

    def _documents(self) -> Iterator[tuple[str, int, Document, int]]:
        start = 0
        for file in self.files:
            for where, num_bytes, document, position in self._documents_of(file):
                yield where, num_bytes, document, start + position
            start += 0 if is_pipe(file) else os.path.getsize(file)

    def _documents_of(self, file: str) -> Iterator[tuple[str, int, Document, int]]:
        """Yield the documents of a file, with the bytes of each and how far the file is read.

        Raises:
            DataError: there are only bad lines in it.
        """
        skipped, is_used = self.num_skipped, False
        try:
            with open(file, "rb", buffering=0) as raw:
                counted = Counted(raw)
                stream = io.BufferedReader(counted, _READ_BYTES)
                kind = kind_of(file, stream)
                found = (
                    self._rows(file)
                    if kind == "parquet"
                    else self._lines(file, lines_of(file, stream, kind), counted)
                )
                for document in found:
                    is_used = True
                    yield document
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error}") from error
        if not is_used and self.num_skipped > skipped:
            raise DataError(f"{file}: no line of it holds a document: leave the file out")

    def _lines(
        self, file: str, lines: Iterator[bytes], counted: Counted
    ) -> Iterator[tuple[str, int, Document, int]]:
        for number, line in enumerate(lines, start=1):
            if line.isspace() or not line:
                continue
            where = f"{file}:{number}"
            try:
                document = parse_line(line, self.keys)
            except BadLineError as error:
                self._on_bad_line(where, error)
                continue
            yield where, len(line), document, counted.num_bytes

    def _rows(self, file: str) -> Iterator[tuple[str, int, Document, int]]:
        if is_pipe(file):
            raise DataError(f"{file}: a parquet table cannot be read from a pipe: give the file")
        all_bytes, read = os.path.getsize(file), 0
        for number, row in enumerate(rows_of(file, self.keys), start=1):
            where = f"{file}:{number}"
            try:
                document = texts_of(row, self.keys)
            except BadLineError as error:
                self._on_bad_line(where, error)
                continue
            num_bytes = sum(len(text) for texts in document for text in texts)
            read += num_bytes
            yield where, num_bytes, document, min(read, all_bytes)

    def _on_bad_line(self, where: str, error: BadLineError) -> None:
        if not self.skip_bad_lines:
            raise DataError(
                f"{where}: {error}. Mend the line, or go on without such lines: --on-error skip"
            ) from error
        self.num_skipped += 1
        if self.num_skipped <= _NUM_SKIPS_SHOWN:
            print(f"skipped {where}: {error}", file=sys.stderr)
        elif self.num_skipped == _NUM_SKIPS_SHOWN + 1:
            print("further skipped lines are only counted", file=sys.stderr)
