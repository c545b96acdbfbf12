"""A folder that appears under its name only when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seq1f1b.errors import Seq1F1BError

_LOCK = ".seq1f1b-lock"
_CONTENT = "content"
_GIB = 1 << 30


class FolderError(Seq1F1BError, ValueError):
    """A folder that cannot be made; the message names it."""


@contextmanager
def whole_folder(output: Path, num_bytes: int) -> Iterator[Path]:
    """Yield where to make a folder that is moved to ``output`` if the block ends well.

    What a run left that was killed is removed by the next one. Two runs with the same ``output``
    do not meet.

    Raises:
        FolderError: ``output`` exists, cannot be made, or does not fit on its disk.
    """
    if os.path.lexists(output):
        raise FolderError(f"{output} exists: choose another --output, or remove it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
    except OSError as error:
        raise FolderError(f"{output.parent} cannot be written to: {error.strerror}") from None
    if free < num_bytes:
        raise FolderError(
            f"{output} needs {num_bytes / _GIB:.1f} GiB, and the disk of {output.parent} has "
            f"{free / _GIB:.1f} GiB left"
        )
    with _claimed(output.with_name(f"{output.name}.partial")) as partial:
        yield partial / _CONTENT
        (partial / _CONTENT).rename(output)


@contextmanager
def _claimed(partial: Path) -> Iterator[Path]:
    """Make the folder ``partial``, hold its lock, and remove it in the end."""
    lock_file = partial / _LOCK
    if os.path.lexists(partial) and not lock_file.exists():
        raise FolderError(f"{partial} is in the way: remove it")
    try:
        partial.mkdir(exist_ok=True)
        lock = lock_file.open("a")
    except OSError as error:
        raise FolderError(f"{partial} cannot be written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"another run is writing to {partial}: wait for it") from None
        except OSError:
            pass  # a file system without locks
        try:
            shutil.rmtree(partial / _CONTENT, ignore_errors=True)
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
