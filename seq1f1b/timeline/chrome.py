"""A timeline as a trace that chrome://tracing and ui.perfetto.dev open."""

from collections.abc import Iterator, Sequence
from typing import Any

from seq1f1b.timeline.model import Timeline


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Return the trace as what ``json.dump`` takes: a process per timeline, a thread per stage.

    The format counts microseconds; a plan without seconds gets a millisecond per unit of time.
    """
    events = [event for pid, timeline in enumerate(timelines) for event in _events(pid, timeline)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(pid: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    scale = 1e6 if timeline.seconds else 1e3
    yield _metadata("process_name", pid, 0, name=timeline.name)
    yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    for stage, spans in enumerate(timeline.stages):
        yield _metadata("thread_name", pid, stage, name=f"stage {stage}")
        yield _metadata("thread_sort_index", pid, stage, sort_index=stage)
        for action, start, end in spans:
            yield {
                "ph": "X",
                "pid": pid,
                "tid": stage,
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


def _metadata(kind: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": arguments}
