"""What is on disk of each run, by which a sweep resumes."""

import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seq1f1b_tools.sweep.metrics import read_metrics


class OutputError(RuntimeError):
    """The folder for the results cannot be used."""


@dataclass(frozen=True)
class Record:
    """How a run ended.

    command: what decides whether a later run is the same one.
    """

    name: str
    status: str
    error: str
    seconds: float
    command: str


class Output:
    """The folder with the results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Any = None

    def log(self, name: str, node: int = 0) -> Path:
        """Return where the output of a run goes; each node has its own."""
        return self.folder / "logs" / (f"{name}.node{node}.log" if node else f"{name}.log")

    def metrics(self, name: str) -> Path:
        """Return where a run's figures go."""
        return self.folder / "metrics" / f"{name}.jsonl"

    def _record(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}.json"

    def claim(self) -> None:
        """Make the folder and keep other sweeps out of it until this process ends.

        Raises:
            OutputError: it cannot be written to, or another sweep runs in it.
        """
        try:
            for part in ("logs", "metrics", "runs"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise OutputError(f"OUTPUT={self.folder}: cannot be written to: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"OUTPUT={self.folder}: another sweep is writing there; wait for it, or choose "
                "another folder"
            ) from error
        except OSError:
            pass  # a file system without locks

    def load(self, name: str) -> Record | None:
        """Return the record of a run, or None if there is none to be read."""
        try:
            return Record(**json.loads(self._record(name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def forget(self, name: str) -> None:
        """Remove what is known of a run, before it starts again."""
        self._record(name).unlink(missing_ok=True)
        self.metrics(name).unlink(missing_ok=True)

    def save(self, record: Record) -> None:
        """Write a record, whole or not at all."""
        path = self._record(record.name)
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(json.dumps(asdict(record), indent=2) + "\n")
        os.replace(beside, path)

    def is_settled(self, name: str, command: str, num_iterations: int, *, retry: bool) -> bool:
        """Whether a run with the same command is done, or has failed and is not to be retried."""
        record = self.load(name)
        if record is None or record.command != command:
            return False
        if record.status == "ok":
            return len(read_metrics(self.metrics(name))) >= num_iterations
        return not retry
