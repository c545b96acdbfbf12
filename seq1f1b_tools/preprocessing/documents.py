"""Where a corpus comes from: the standard library's source, or a data set of the hub."""

import ast
import itertools
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seq1f1b_tools.preprocessing.errors import DataError, SettingError, from_extra

HUB_DATASETS = {"codeparrot": "codeparrot/codeparrot-clean-train"}
_TEST_FOLDERS = {"test", "tests"}
_INSTALLED_PACKAGES = {"site-packages", "dist-packages"}

Row = dict[str, str]
"""One document: its `path`, and its source text under `content`."""


def standard_library_files(root: Path) -> list[Path]:
    """The .py files below `root`, by name, without installed packages."""
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if not _INSTALLED_PACKAGES & set(path.parts)]


def standard_library_rows(root: Path) -> Iterator[Row]:
    """The standard library's source files that hold text, as rows, in order of their names.

    It omits files that cannot be decoded and, among the tests, those that are not Python: they
    are broken on purpose.
    """
    for path in standard_library_files(root):
        name = path.relative_to(root)
        try:
            with tokenize.open(path) as file:
                text = file.read()
            if _TEST_FOLDERS & set(name.parts):
                with warnings.catch_warnings(action="ignore"):
                    ast.parse(text)
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if text.strip():
            yield {"path": name.as_posix(), "content": text}


def standard_library_root() -> Path:
    """The running interpreter's standard library.

    Raises:
        SettingError: it was installed without its source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise SettingError(
            f"--dataset stdlib: no source files in {root}: this Python was installed without them. "
            "Use another Python, or --dataset codeparrot"
        )
    return root


class HubRows:
    """Rows of a data set of the hub, read as a stream that can be taken up again.

    Args:
        dataset: a key of HUB_DATASETS.
        state: what `state()` gave in an earlier run, to go on from there.

    Raises:
        SettingError: the data set cannot be reached.
    """

    def __init__(self, dataset: str, state: dict[str, Any] | None = None) -> None:
        # the bars of single downloads would tear ours
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self.dataset = dataset
        with from_extra(f"--dataset {dataset}"):
            import datasets
        try:
            self._stream = datasets.load_dataset(
                HUB_DATASETS[dataset], split="train", streaming=True
            )
            if state is not None:
                self._stream.load_state_dict(state)
            rows = iter(self._stream)
            self._rows = itertools.chain(list(itertools.islice(rows, 1)), rows)
        except Exception as error:  # the hub's client raises classes of every kind
            raise SettingError(
                f"--dataset {dataset}: {HUB_DATASETS[dataset]} cannot be read from the Hugging "
                f"Face hub: {error}. Check the network (HF_ENDPOINT, HF_HUB_OFFLINE and "
                "https_proxy have a say), or work offline with --dataset stdlib"
            ) from error

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows.

        Raises:
            DataError: the connection broke and stayed broken.
        """
        try:
            for row in self._rows:
                path = "/".join(filter(None, (row.get("repo_name"), row.get("path"))))
                yield {"path": path, "content": row["content"]}
        except Exception as error:  # as above
            raise DataError(
                f"--dataset {self.dataset}: the stream broke: {type(error).__name__}: {error}. "
                "The same command goes on from here"
            ) from error

    def state(self) -> dict[str, Any]:
        """Where the stream stands, after the last row that was taken."""
        return self._stream.state_dict()
