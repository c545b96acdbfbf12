"""What is on disk of each run: how it ended, and what it measured."""

import fcntl
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

_MIB = 2**20


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


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the iterations in ``file``; a line that is being written is left out."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


@dataclass(frozen=True)
class Summary:
    """A run's figures, without its first iterations (losses: with them).

    steps has the milliseconds of each; both rates are of their median; memory is the highest peak,
    by stage; bubble_ratio is the mean over stages of each iteration, and of these the median.
    """

    steps: tuple[float, ...]
    tokens_per_second: float
    tflops_per_device: float
    peak_memory_mib: tuple[float, ...]
    kv_carry_mib: tuple[float, ...]
    bubble_ratio: float
    losses: tuple[float | None, ...]

    @property
    def milliseconds(self) -> float:
        """The median step."""
        return median(self.steps)

    @property
    def last_loss(self) -> float | None:
        """The loss of the last iteration."""
        return self.losses[-1]


def summarize(entries: Sequence[dict[str, Any]], num_warmup: int) -> Summary | None:
    """Summarize iterations, leaving out the first ``num_warmup``; None if none are left."""
    counted = entries[num_warmup:]
    if not counted:
        return None
    steps = tuple(entry["milliseconds"] for entry in counted)
    # the work of a step is the same in all of them
    scale = steps[-1] / median(steps)
    return Summary(
        steps=steps,
        tokens_per_second=counted[-1]["tokens_per_second"] * scale,
        tflops_per_device=counted[-1]["tflops_per_device"] * scale,
        peak_memory_mib=_peaks(counted, "peak_activation_bytes"),
        kv_carry_mib=_peaks(counted, "kv_carry_bytes"),
        bubble_ratio=median(fmean(entry["bubble_ratio"]) for entry in counted),
        losses=tuple(entry["lm_loss"] for entry in entries),
    )


def _peaks(entries: Sequence[dict[str, Any]], key: str) -> tuple[float, ...]:
    by_stage = zip(*(entry[key] for entry in entries), strict=True)
    return tuple(max(stage) / _MIB for stage in by_stage)


def speedup(steps: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median of what ``baseline`` takes for a step over what ``steps`` take for it.

    Steps of runs that take turns lie side by side, so the speed of the machine is in both or in
    neither. It is not in the quotient of two medians, each of which may be of another minute.
    """
    return median(theirs / ours for ours, theirs in zip(steps, baseline, strict=False))


def largest_loss_difference(
    losses: Sequence[float | None], reference: Sequence[float | None]
) -> float | None:
    """Return the largest relative difference over the iterations that both have.

    A loss that is not a number differs by infinity. None if there is nothing to compare.
    """
    differences = [
        abs(loss - other) / abs(other) if math.isfinite(loss) and other else math.inf
        for loss, other in zip(losses, reference, strict=False)
        if loss is not None and other is not None and loss != other
    ]
    compared = any(a is not None and b is not None for a, b in zip(losses, reference, strict=False))
    return max(differences, default=0.0) if compared else None
