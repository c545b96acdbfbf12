"""Files that are replaced whole or not at all, and folders that need not be there yet."""

import errno
import json
import math
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not become so large (ulimit -f)",
}
_PROBE_BYTES = 1 << 20


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


def why_full(folder: Path, error: BaseException) -> str | None:
    """Return why nothing more can be written to ``folder``; None if something can.

    ``error`` is what a writer raised, which may name the cause somewhere in its chain; otherwise a
    file is written to see.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return _FULL[seen.errno]
        seen = seen.__cause__ or seen.__context__
    try:
        with tempfile.TemporaryFile(dir=existing_folder(folder)) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as failure:
        return _FULL.get(failure.errno or 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and any(
        file.stat().st_size >= limit for file in folder.rglob("*") if file.is_file()
    ):
        return _FULL[errno.EFBIG]
    return None


def set_aside(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Move the lines of a text that are not kept to ``<path>.replaced``, if there is a text."""
    if not path.exists():
        return
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text(errors="replace").splitlines():
        (kept if is_kept(line) else moved).append(line + "\n")
    if not moved:
        return
    with path.with_name(path.name + ".replaced").open("a") as stream:
        stream.writelines(moved)
    with replacing(path) as stream:
        stream.writelines(kept)


def number_in(line: str, key: str) -> float:
    """Return the number under ``key`` of a line of JSON; infinity for one that was cut off."""
    try:
        return float(json.loads(line)[key])
    except (ValueError, TypeError, KeyError):
        return math.inf
