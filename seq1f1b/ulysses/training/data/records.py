"""Records of a data set: from JSON lines, Parquet, the hub, or Python's own library."""

from seq1f1b.errors import Seq1F1BError
import glob
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON_LIBRARY = "python-library"
_ENDINGS = (".jsonl", ".json", ".parquet")


class DataError(Seq1F1BError, ValueError):
    """The data cannot be read as the recipe says; names file and line."""


@dataclass(frozen=True)
class Record:
    """One record, and where it stands: ``file:line`` or ``file, record``."""

    place: str
    content: dict[str, Any]


def read_records(source: str | list[str], split: str) -> Iterator[Record]:
    """Yield all records in the order of the sources. Raises DataError."""
    for name in [source] if isinstance(source, str) else source:
        if name == PYTHON_LIBRARY:
            yield from _python_library()
            continue
        paths = source_files(name)
        if paths:
            for path in paths:
                yield from _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
        else:
            yield from _read_hub(name, split)


def source_files(name: str) -> list[Path]:
    """Return the files of a source that is a file, a folder or a pattern; none for the hub's."""
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in _ENDINGS)
        if not found:
            raise DataError(f"data.source: {name} holds no {' or '.join(_ENDINGS)} file")
        return found
    if path.is_file():
        if path.suffix not in _ENDINGS:
            raise DataError(f"data.source: {name} must end in {' or '.join(_ENDINGS)}")
        return [path]
    matches = sorted(Path(p) for p in glob.glob(name))
    if not matches and (path.suffix in _ENDINGS or name.startswith(("/", "."))):
        raise DataError(f"data.source: no file {name}")
    return matches


def _python_library() -> Iterator[Record]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.glob("*.py")):
        yield Record(path.name, {"text": path.read_text(encoding="utf-8", errors="replace")})


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 at byte {error.start} of the line") from None
            except (ValueError, RecursionError) as error:  # no JSON, or digits or brackets galore
                raise DataError(f"{place}: no JSON: {error}") from None
            if not isinstance(content, dict):
                raise DataError(f"{place}: a record is an object, not {type(content).__name__}")
            yield Record(place, content)


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _lacking(f"{path}: a Parquet file", "pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: no Parquet: {error}") from None
    number = 0
    batches = file.iter_batches(batch_size=256)
    while True:
        try:
            batch = next(batches, None)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}, behind record {number}: {error}") from None
        if batch is None:
            return
        for content in batch.to_pylist():
            number += 1
            yield Record(f"{path}, record {number}", content)


def _read_hub(name: str, split: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise _lacking(f"data.source: {name}, which is no file and no folder,", "datasets") from None
    try:
        records = load_dataset(name, split=split, streaming=True)
    except Exception as error:
        raise DataError(
            f"data.source: {name} is no file, no folder, and cannot be fetched from the hub: {error}"
        ) from None
    for number, content in enumerate(records, start=1):
        yield Record(f"{name}, record {number}", dict(content))


def _lacking(what: str, package: str) -> DataError:
    return DataError(f"{what} needs the package {package}: pip install 'seq1f1b[data]'")
