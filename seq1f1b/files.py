"""Files that are replaced whole or not at all, and folders that need not be there yet."""

import os
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


def cannot_write(file: Path) -> str | None:
    """Return why ``file`` could not be made or added to; nothing is left behind."""
    if file.is_dir():
        return "it is a folder"
    if file.exists():
        return None if os.access(file, os.W_OK) else "permission denied"
    return cannot_fill(file.absolute().parent)


def cannot_fill(folder: Path) -> str | None:
    """Return why nothing could be put into ``folder``, which need not be there yet."""
    folder = existing_folder(folder)
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"no permission in {folder}"


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
