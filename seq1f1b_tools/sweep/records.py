"""What is on disk of each run: how it ended, and what it measured."""

import fcntl
import json
import math
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from seq1f1b.errors import Seq1F1BError
from seq1f1b.files import replacing
from seq1f1b_tools.sweep.launch import Status

_MIB = 2**20

Finite = Annotated[float, Field(allow_inf_nan=False, ge=0)]


class OutputError(Seq1F1BError, RuntimeError):
    """The folder for the results cannot be used."""


@dataclass(frozen=True)
class Record:
    """How a run ended.

    command: what decides whether a later run is the same one.
    """

    name: str
    status: Status
    error: str
    seconds: Finite
    command: str


_RECORD = TypeAdapter(Record)


class Output:
    """The folder with the results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Any = None

    def log(self, name: str, node: int = 0) -> Path:
        """Return where the output of a run goes; each node has its own."""
        return self.folder / "logs" / (f"{name}.node{node}.log" if node else f"{name}.log")

    def metrics(self, name: str) -> Path:
        """Return where a run's figures are: while it runs, a link to what this start writes."""
        return self.folder / "metrics" / f"{name}.jsonl"

    def started(self, name: str, start: str) -> Path:
        """Return what one start of a run writes its figures into."""
        return self.folder / "metrics" / f"start-{start}" / f"{name}.jsonl"

    @property
    def lock(self) -> tuple[int, ...]:
        """The file that other sweeps are kept out by, where it is held."""
        return () if self._lock is None else (self._lock.fileno(),)

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
            return _RECORD.validate_json(self._record(name).read_bytes())
        except (OSError, ValueError):
            return None

    def begin(self, name: str) -> str:
        """Remove what is known of a run and return the name of a new start of it.

        Whatever an earlier start still writes, it writes into a file of its own.
        """
        self._record(name).unlink(missing_ok=True)
        self.metrics(name).unlink(missing_ok=True)
        for left in (self.folder / "metrics").glob(f"start-*/{name}.jsonl"):
            left.unlink()
            with suppress(OSError):  # other runs of that start
                left.parent.rmdir()
        start = secrets.token_hex(4)
        file = self.started(name, start)
        file.parent.mkdir(parents=True)
        self.metrics(name).symlink_to(file.relative_to(self.folder / "metrics"))
        return start

    def end(self, name: str) -> None:
        """Keep what the last start of a run wrote as the figures of the run."""
        link = self.metrics(name)
        if not link.is_symlink():
            return
        file = link.resolve()
        if file.exists():
            os.replace(file, link)
        else:
            link.unlink()
        with suppress(OSError):
            file.parent.rmdir()

    def save(self, record: Record) -> None:
        """Write a record, whole or not at all."""
        path = self._record(record.name)
        with replacing(path) as stream:
            stream.write(json.dumps(asdict(record), indent=2) + "\n")

    def is_settled(self, name: str, command: str, num_iterations: int, *, retry: bool) -> bool:
        """Whether a run with the same command is done, or has failed and is not to be retried."""
        record = self.load(name)
        if record is None or record.command != command:
            return False
        if record.status == "ok":
            entries = whole_iterations(read_metrics(self.metrics(name)))
            return len(entries) >= num_iterations
        return not retry


class Iteration(BaseModel):
    """One iteration as a run writes it; lists have a number for each stage."""

    iteration: int
    lm_loss: float | None
    milliseconds: Annotated[float, Field(allow_inf_nan=False, gt=0)]
    tokens_per_second: Finite
    tflops_per_device: Finite
    peak_activation_bytes: Annotated[list[Finite], Field(min_length=1)]
    kv_carry_bytes: Annotated[list[Finite], Field(min_length=1)]
    bubble_ratio: Annotated[list[Finite], Field(min_length=1)]
    action_milliseconds: list[dict[str, Finite]] = []


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the iterations in ``file``, up to a line that is damaged or still being written."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def whole_iterations(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first iterations, as long as they are whole, in order and of one run."""
    whole: list[dict[str, Any]] = []
    for entry in entries:
        try:
            found = Iteration.model_validate(entry, strict=True).model_dump(exclude_unset=True)
        except ValidationError:
            break
        if whole and found["iteration"] != whole[-1]["iteration"] + 1:
            break
        num_stages = {
            len(value)
            for e in (found, *whole[:1])
            for value in e.values()
            if isinstance(value, list)
        }
        if len(num_stages) > 1:
            break
        whole.append(found)
    return whole


@dataclass(frozen=True)
class Summary:
    """A run's figures, without its first iterations (losses: with them).

    steps has the milliseconds of each; both rates are of their median; memory is the highest peak,
    by stage; bubble_ratio is the mean over stages of each iteration, and of these the median;
    bubble_by_stage is each stage's median. action_milliseconds has the median of every action's
    time, by stage.
    """

    steps: tuple[float, ...]
    tokens_per_second: float
    tflops_per_device: float
    peak_memory_mib: tuple[float, ...]
    kv_carry_mib: tuple[float, ...]
    bubble_ratio: float
    bubble_by_stage: tuple[float, ...]
    losses: tuple[float | None, ...]
    action_milliseconds: tuple[dict[str, float], ...] = ()

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
        bubble_by_stage=tuple(
            median(stage) for stage in zip(*(e["bubble_ratio"] for e in counted), strict=True)
        ),
        losses=tuple(entry["lm_loss"] for entry in entries),
        action_milliseconds=_actions(counted),
    )


def _peaks(entries: Sequence[dict[str, Any]], key: str) -> tuple[float, ...]:
    by_stage = zip(*(entry[key] for entry in entries), strict=True)
    return tuple(max(stage) / _MIB for stage in by_stage)


def _actions(entries: Sequence[dict[str, Any]]) -> tuple[dict[str, float], ...]:
    """Return medians over the entries, or nothing where they do not name the same actions."""
    lists = [entry.get("action_milliseconds", []) for entry in entries]
    names = [[set(stage) for stage in stages] for stages in lists]
    if any(each != names[0] for each in names):
        return ()
    return tuple(
        {name: median(each[name] for each in stage) for name in stage[0]}
        for stage in zip(*lists, strict=True)
    )


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
