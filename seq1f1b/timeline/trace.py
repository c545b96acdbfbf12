"""Measured actions in a file: one JSON object a line, from any number of stages in any order.

``{"stage": 0, "action": "0F3.1", "start": 0.0125, "end": 0.0172}``, seconds since the step began.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TextIO

from seq1f1b.schedule import Action
from seq1f1b.timeline.model import Span, Timeline


class TraceError(ValueError):
    """A trace that cannot be read; the message names file and line."""


class _Timed(Protocol):
    @property
    def action(self) -> Action: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


def write_trace(stream: TextIO, stage: int, timed: Iterable[_Timed]) -> None:
    """Append one stage's actions to an open file."""
    for entry in timed:
        fields = {
            "stage": stage,
            "action": str(entry.action),
            "start": entry.start,
            "end": entry.end,
        }
        stream.write(json.dumps(fields) + "\n")


def read_trace(path: Path) -> Timeline:
    """Read the computations of a trace, sends and receives left out.

    Raises TraceError for anything that is not one action a line, for an action that ends before it
    starts or comes twice, and for a stage without any.
    """
    stages: dict[int, dict[Action, Span]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            stage, span = _parse(line)
        except (ValueError, TypeError) as error:
            raise TraceError(f"{path}:{number}: {error}") from None
        spans = stages.setdefault(stage, {})
        if span.action in spans:
            raise TraceError(
                f"{path}:{number}: {span.action} on stage {stage} comes twice; "
                f"a trace holds the actions of one step"
            )
        if span.action.kind.is_compute:
            spans[span.action] = span
    for stage in range(max(stages, default=0) + 1):
        if not stages.get(stage):
            raise TraceError(f"{path}: no computation of stage {stage}")
    return Timeline(
        "measured",
        tuple(
            tuple(sorted(stages[stage].values(), key=lambda span: (span.start, span.end)))
            for stage in range(len(stages))
        ),
        seconds=True,
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None


def _parse(line: str) -> tuple[int, Span]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise TypeError("not a JSON object")
    missing = [name for name in ("stage", "action", "start", "end") if name not in fields]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    stage, action = fields["stage"], fields["action"]
    if not isinstance(stage, int) or isinstance(stage, bool) or stage < 0:
        raise ValueError(f"stage is {stage!r}; it must be a number from 0")
    if not isinstance(action, str):
        raise TypeError(f"action is {action!r}; it must be text such as 0F3.1")
    times = [fields["start"], fields["end"]]
    if not all(isinstance(time, int | float) and math.isfinite(time) for time in times):
        raise ValueError("start and end must be numbers of seconds")
    if times[1] < times[0] or times[0] < 0:
        raise ValueError(f"{action} starts at {times[0]} and ends at {times[1]}")
    return stage, Span(Action.parse(action), float(times[0]), float(times[1]))
