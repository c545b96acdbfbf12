"""A timeline as a trace that chrome://tracing and ui.perfetto.dev open."""

from collections.abc import Iterator, Sequence
from typing import Any

from seq1f1b.schedule import Span
from seq1f1b.timeline.model import LANES, Timeline


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Return the trace as what ``json.dump`` takes: a process per timeline, a thread per stage.

    Copies of model chunks are threads below their stage's. The format counts microseconds; a plan
    without seconds gets a millisecond per unit of time.
    """
    events = [event for pid, timeline in enumerate(timelines) for event in _events(pid, timeline)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(pid: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    scale = 1e6 if timeline.seconds else 1e3
    yield _metadata("process_name", pid, 0, name=timeline.name)
    yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    for tid, place, name, spans in _threads(timeline):
        yield _metadata("thread_name", pid, tid, name=name)
        yield _metadata("thread_sort_index", pid, tid, sort_index=place)
        for action, start, end in spans:
            yield {
                "ph": "X",
                "pid": pid,
                "tid": tid,
                "name": str(action),
                "cat": action.kind.value,
                "ts": start * scale,
                "dur": (end - start) * scale,
                "args": {
                    "chunk": action.chunk,
                    "micro-batch": action.micro_batch,
                    "sub-sequence": action.sub_sequence,
                },
            }
    for stage, curve in enumerate(timeline.memory):
        for time, held in curve:
            yield {
                "ph": "C",
                "pid": pid,
                "name": f"memory of stage {stage} ({timeline.memory_unit})",
                "ts": time * scale,
                "args": {"held": held},
            }


def _threads(timeline: Timeline) -> Iterator[tuple[int, int, str, tuple[Span, ...]]]:
    """Yield number, place from above, name and spans of each; stages have the first numbers."""
    pitch = 1 + len(LANES)
    for stage, spans in enumerate(timeline.stages):
        yield stage, pitch * stage, f"stage {stage}", spans
    free = len(timeline.stages)
    for stage, lanes in enumerate(timeline.copies):
        for lane, spans in enumerate(lanes):
            name = f"stage {stage} {LANES[lane]}"
            yield free + len(LANES) * stage + lane, pitch * stage + lane + 1, name, spans


def _metadata(kind: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": arguments}
