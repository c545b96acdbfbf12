"""Rows to a JSON-lines file that appears whole, and grows on after an interruption."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from seq1f1b_tools.preprocessing.documents import HubRows, Row
from seq1f1b_tools.preprocessing.progress import ProgressReport


@dataclass
class CorpusSize:
    """How much of a corpus has been written."""

    num_documents: int = 0
    text_bytes: int = 0
    file_bytes: int = 0


class PartialCorpus:
    """A corpus under way: the rows so far beside the final file, and where their source stood.

    Args:
        path: the final file.
        settings: what the rows depend on; a partial file made under others is not gone on with.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.size = CorpusSize()
        self.source_state: dict[str, Any] | None = None
        self._partial = path.with_name(path.name + ".part")
        self._state = path.with_name(path.name + ".part.json")

    def resume(self) -> Self:
        """Take up what an earlier run with the same settings left, if it left anything."""
        try:
            saved = json.loads(self._state.read_text())
            left = self._partial.stat().st_size
        except (OSError, ValueError):
            return self
        if saved["settings"] == self.settings and left >= saved["size"]["file_bytes"]:
            self.size = CorpusSize(**saved["size"])
            self.source_state = saved["source_state"]
        return self

    def write(self, rows: HubRows | Iterable[Row], max_bytes: int, report: ProgressReport) -> None:
        """Append rows until their texts reach `max_bytes`, then give the file its name.

        Whatever ends it early, rows that came from the hub are kept for `resume`; others, made
        again in seconds, are removed.
        """
        try:
            with open(self._partial, "r+b" if self.source_state else "wb") as file:
                file.seek(self.size.file_bytes)
                file.truncate()
                for row in rows:
                    num_bytes = self._append(file, row)
                    report.advance(1, num_bytes, self.size.text_bytes)
                    if self.size.text_bytes >= max_bytes:
                        break
        except BaseException:
            self._keep(rows)
            raise
        os.replace(self._partial, self.path)
        self._state.unlink(missing_ok=True)

    def _append(self, file: BinaryIO, row: Row) -> int:
        line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
        num_bytes = len(row["content"].encode("utf-8"))
        file.write(line)
        self.size.num_documents += 1
        self.size.text_bytes += num_bytes
        self.size.file_bytes += len(line)
        return num_bytes

    def _keep(self, rows: HubRows | Iterable[Row]) -> None:
        if not isinstance(rows, HubRows):
            self._partial.unlink(missing_ok=True)
            return
        saved = {
            "settings": self.settings,
            "size": asdict(self.size),
            "source_state": rows.state(),
        }
        self._state.write_text(json.dumps(saved))
