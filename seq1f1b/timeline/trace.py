"""Measured actions in a file: one JSON object a line, from any number of stages in any order.

``{"stage": 0, "action": "0F3.1", "start": 0.0125, "end": 0.0172}``, seconds since the step began.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from seq1f1b.errors import Seq1F1BError
from seq1f1b.schedule import Action, Span
from seq1f1b.timeline.model import Timeline

_MOST_SECONDS = 1e12


class TraceError(Seq1F1BError, ValueError):
    """A trace that cannot be read; the message names file and line."""


def write_trace(stream: TextIO, stage: int, spans: Iterable[Span]) -> None:
    """Append one stage's actions to an open file."""
    for entry in spans:
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
    starts or comes twice, for a stage without any, and for actions that cannot be of one step.
    """
    stages: dict[int, dict[Action, Span]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            stage, span = _parse(line)
        except RecursionError:
            raise TraceError(f"{path}:{number}: brackets are nested too deep") from None
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
    for stage in range(len(stages) + 1):
        if not stages.get(stage) and stage <= max(stages, default=0):
            raise TraceError(f"{path}: no computation of stage {stage}")
    _check_step(path, [list(stages[stage].values()) for stage in range(len(stages))])
    return Timeline(
        "measured",
        tuple(
            tuple(sorted(stages[stage].values(), key=lambda span: (span.start, span.end)))
            for stage in range(len(stages))
        ),
        seconds=True,
    )


def _check_step(path: Path, stages: list[list[Span]]) -> None:
    """Raise TraceError unless actions take time, and there are as many as they are counted to."""
    spans = [span for stage in stages for span in stage]
    if not any(span.end > span.start for span in spans):
        raise TraceError(f"{path}: no action takes any time")
    actions = [span.action for span in spans]
    counts = (
        max(action.chunk for action in actions) + 1,
        max(action.micro_batch for action in actions) + 1,
        max(action.sub_sequence for action in actions) + 1,
    )
    most = max(map(len, stages))
    if math.prod(counts) > most:
        chunks, micro_batches, sub_sequences = counts
        raise TraceError(
            f"{path}: not one whole step: no stage has more than {most} actions, too few for "
            f"{chunks} model chunks, {micro_batches} micro-batches and {sub_sequences} "
            f"sub-sequences, which some of them belong to"
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
    if not all(map(_is_time, times)):
        raise ValueError("start and end must be numbers of seconds")
    if times[1] < times[0] or times[0] < 0:
        raise ValueError(f"{action} starts at {times[0]} and ends at {times[1]}")
    return stage, Span(Action.parse(action), float(times[0]), float(times[1]))


def _is_time(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _MOST_SECONDS  # which infinity and NaN are not
