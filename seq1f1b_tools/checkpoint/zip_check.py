"""The check sums of what torch.save writes, which torch.load does not look at."""

import io
import zipfile
from pathlib import Path
from typing import BinaryIO

from seq1f1b_tools.checkpoint.problem import ConversionError


def part_of(file: BinaryIO, start: int, length: int) -> BinaryIO:
    """Return ``length`` bytes of ``file`` from ``start`` on as a file of its own."""
    return io.BufferedReader(_Part(file, start, length))


class _Part(io.RawIOBase):
    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in the part."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position in the part."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """Fill ``buffer`` as far as the part goes."""
        view = memoryview(buffer)
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view[:left])  # type: ignore[attr-defined]
        self._position += count
        return int(count)


def check(file: BinaryIO, name: str | Path) -> None:
    """Compare the CRC-32 of every member of a zip archive.

    Raises:
        ConversionError: ``file`` is damaged; the message names ``name``.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, ValueError) as error:
        raise ConversionError(f"{name} is damaged: {error}") from None
    if damaged is not None:
        raise ConversionError(f"{name} is damaged: the check sum of {damaged} does not match")
    file.seek(0)
