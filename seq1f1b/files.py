"""Files that are replaced whole or not at all, and folders that need not be there yet."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def existing_folder(path: Path) -> Path:
    """Return ``path``, or the nearest of its parents that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def replacing(path: Path, **options: Any) -> Iterator[TextIO]:
    """Open a file for text beside ``path``, which it replaces when the block ends without an error.

    The folder is made if need be. ``options`` go to ``open``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("w", **options) as stream:
            yield stream
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
