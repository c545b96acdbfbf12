"""JSON lines in, batches of texts out: globs, .gz, and errors that name file and line."""

import glob
import gzip
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from seq1f1b_tools.preprocessing.errors import DataError, SettingError

_NUM_SKIPS_SHOWN = 5

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


class BadLineError(ValueError):
    """One line that holds no usable document."""


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """The files that the patterns name, each pattern's in sorted order.

    Raises:
        SettingError: a pattern matches no file, or a match cannot be read.
    """
    files: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise SettingError(f"--input {pattern}: no such file, and as a pattern it matches none")
        files.extend(matches)
    for file in files:
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise SettingError(f"--input {file}: cannot be read: {error.strerror}") from error
    return files


def parse_line(line: bytes, keys: Sequence[str]) -> Document:
    """The texts under `keys` of one JSON line.

    Raises:
        BadLineError: the line is no JSON object, lacks a key, or holds something else than text.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLineError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadLineError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadLineError(f"holds a JSON {type(row).__name__}, not an object")
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
        files: paths; a name that ends in .gz is unpacked on the way.
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
        self.total_bytes = sum(os.path.getsize(file) for file in files)
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
            number = 0
            try:
                with open(file, "rb") as raw, _unpacked(file, raw) as lines:
                    for number, line in enumerate(lines, start=1):
                        where = f"{file}:{number}"
                        try:
                            document = parse_line(line, self.keys)
                        except BadLineError as error:
                            self._on_bad_line(where, error)
                            continue
                        yield where, len(line), document, start + raw.tell()
            except (OSError, EOFError) as error:
                raise DataError(f"{file}: cannot be read after line {number}: {error}") from error
            start += os.path.getsize(file)

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


def _unpacked(file: str, raw: BinaryIO) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else raw  # type: ignore[return-value]
