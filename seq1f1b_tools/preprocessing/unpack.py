"""Lines of files that may be compressed, and rows of tables."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from seq1f1b_tools.preprocessing.errors import DataError, from_extra

PARQUET = ".parquet"
COMPRESSIONS = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
_SIGNS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
}
_SIGN_BYTES = max(map(len, _SIGNS))
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PACKED_BYTES = 1 << 13  # at once: a few bytes may unpack to a megabyte
_UNPACKED_BYTES = 1 << 17
_ROWS = 1024


class Counted(io.RawIOBase):
    """A file or pipe that knows how much of it has been read."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.num_bytes = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as there is something; the first time far enough for any sign."""
        view = memoryview(buffer)
        total = self._raw.readinto(view) or 0
        while self.num_bytes == 0 and 0 < total < _SIGN_BYTES:
            count = self._raw.readinto(view[total:])
            if not count:
                break
            total += count
        self.num_bytes += total
        return total


def kind_of(file: str, stream: "io.BufferedReader[Any]") -> str | None:
    """Return how a file is packed, by its first bytes: a compression, parquet, or None.

    Raises:
        DataError: its name says something else.
    """
    start = stream.peek(_SIGN_BYTES)
    found = next((kind for sign, kind in _SIGNS.items() if start.startswith(sign)), None)
    suffixes = COMPRESSIONS | {PARQUET: "parquet"}
    named = next((k for suffix, k in suffixes.items() if file.lower().endswith(suffix)), None)
    if start and named not in (None, found):
        raise DataError(f"{file}: is not {named}, as its name claims: damaged, or misnamed")
    return found


def lines_of(file: str, stream: "io.BufferedReader[Any]", kind: str | None) -> Iterator[bytes]:
    """Yield the lines of a file, unpacked, without the mark that some editors put before UTF-8.

    Raises:
        DataError: the file is damaged, cut off, or in another encoding.
    """
    text: io.BufferedReader[Any] = stream
    if kind is not None:
        text = io.BufferedReader(_Unpacked(stream, _decompressor(kind)), _UNPACKED_BYTES)
    number = 0
    try:
        for number, line in enumerate(text, start=1):
            if number == 1:
                if line.startswith(_OTHER_ENCODINGS):
                    raise DataError(f"{file}: is UTF-16: convert it (iconv -f UTF-16 -t UTF-8)")
                line = line.removeprefix(_BYTE_ORDER_MARK)
            yield line
    except DataError:
        raise
    except Exception as error:  # each library has its own
        raise DataError(f"{file}: cannot be read after line {number}: {error}") from error


def rows_of(file: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file.

    Raises:
        DataError: a column is not there, or the file is damaged.
    """
    with from_extra(f"{file}: a parquet table"):
        from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise DataError(
                        f"{file}: has no column {column!r} (--json-keys); its columns are "
                        + ", ".join(names)
                    )
            for batch in table.iter_batches(_ROWS, columns=list(columns)):
                yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read: {text}") from error


def _decompressor(kind: str) -> Callable[[], Any]:
    """Return what makes a decompressor of one stream, all of which have the same methods."""
    if kind == "zstd":
        with from_extra("a file packed by zstd"):
            import zstandard

        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    return {
        "gzip": lambda: zlib.decompressobj(wbits=zlib.MAX_WBITS | 16),
        "bzip2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
    }[kind]


class _Unpacked(io.RawIOBase):
    """The content of one compressed stream or several in a row, each of which must be whole."""

    def __init__(self, packed: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make = packed, make
        self._stream: Any = None
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
            if self._stream is None:
                self._packed = self._packed.lstrip(b"\0")  # padding, as between streams of xz
                if not self._packed:
                    if self._file.peek(1):  # type: ignore[attr-defined]
                        continue
                    return 0
                self._stream = self._make()
            if not self._packed:
                raise EOFError("it is cut off")
            self._ready = self._stream.decompress(self._packed)
            self._packed = b""
            if self._stream.eof:
                self._packed, self._stream = self._stream.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
