"""Which files ``--input`` names: files, pipes, folders and patterns."""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from seq1f1b_tools.preprocessing.errors import SettingError
from seq1f1b_tools.preprocessing.unpack import COMPRESSIONS, PARQUET

_TEXTS = (".jsonl", ".ndjson", ".json")
_MOST_NAMED = 3


def find_inputs(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files that the patterns name, and remarks on the omitted ones.

    A pattern's files are in sorted order; ``**`` stands for any folders. Of a folder, and of the
    folders in it, those files are taken whose names say that they hold JSON lines or a table.

    Raises:
        SettingError: a pattern matches no file, or a match cannot be read.
    """
    files: list[str] = []
    remarks: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            taken, left = _of_folder(pattern)
            if left:
                some = ", ".join(left[:_MOST_NAMED]) + (", ..." if left[_MOST_NAMED:] else "")
                remarks.append(
                    f"{pattern}: {len(taken)} files taken, {len(left)} left out ({some})"
                )
        elif os.path.exists(pattern):
            taken = [pattern]
        else:
            matches = sorted(glob.glob(pattern, recursive=True))
            taken = [match for match in matches if not os.path.isdir(match)]
        if not taken:
            raise SettingError(f"--input {pattern}: {_nothing(pattern)}")
        files += taken
    _check(files)
    return files, remarks


def is_pipe(file: str) -> bool:
    """Whether a file can be read only once, and has no size."""
    return not stat.S_ISREG(os.stat(file).st_mode)


def _nothing(pattern: str) -> str:
    if os.path.isdir(pattern):
        names = ", ".join((*_TEXTS, PARQUET))
        return f"no file in this directory has a name that ends in one of {names}"
    return "no such file, and as a pattern it matches none"


def _of_folder(folder: str) -> tuple[list[str], list[str]]:
    """Return the files of a folder and of those in it that hold documents, and the others."""
    taken: list[str] = []
    left: list[str] = []
    for path in _walk(Path(folder), set()):
        name = path.name.lower()
        for suffix in COMPRESSIONS:
            name = name.removesuffix(suffix)
        holds_documents = name.endswith((*_TEXTS, PARQUET))
        (taken if holds_documents else left).append(str(path))
    return sorted(taken), sorted(left)


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the files below a folder; links are followed, each folder once, hidden ones never."""
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SettingError(f"--input {folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, seen)
        else:
            yield entry


def _check(files: Sequence[str]) -> None:
    """Raise SettingError for what cannot be read; pipes are not opened, as they would run dry."""
    for file in files:
        try:
            if is_pipe(file):
                if files.count(file) > 1:
                    raise SettingError(f"--input {file}: a pipe can be read only once")
                if not os.access(file, os.R_OK):
                    raise PermissionError(13, "Permission denied")
                continue
            with open(file, "rb"):
                pass
        except OSError as error:
            raise SettingError(f"--input {file}: cannot be read: {error.strerror}") from error
