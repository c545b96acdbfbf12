"""A schedule as lines of text, one a stage, time from left to right."""

from collections.abc import Iterable

from seq1f1b.schedule import Span
from seq1f1b.timeline.model import LANES, Timeline

_IDLE = "·"
_MOST_COLUMNS = 100_000


def text_grid(timeline: Timeline, width: int | None = None) -> str:
    """Draw every computation from its start to its end, and dots where a stage is idle.

    ``F3.1`` is a forward of micro-batch 3, sub-sequence 1; with several model chunks the chunk
    stands before it. Copies of model chunks stand in two lines below their stage's, each with the
    number of its chunk. ``width`` is the number of columns for the whole step; without it the
    shortest computation is as wide as its label. A label that does not fit is cut.
    """
    spans = [span for stage in timeline.stages for span in stage if span.end > span.start]
    if width is None:
        per_time = max(
            ((len(_label(timeline, span)) + 1) / (span.end - span.start) for span in spans),
            default=1.0,
        )
        per_time = min(per_time, _MOST_COLUMNS / max(timeline.length, 1e-300))
    else:
        per_time = width / max(timeline.length, 1e-300)
    number_width = len(str(len(timeline.stages) - 1))
    lines = [
        f"{timeline.name}: step {timeline.time(timeline.length)}, "
        f"bubble ratio {timeline.bubble_ratio:.1%}"
    ]
    for stage in range(len(timeline.stages)):
        row = _row(timeline, timeline.stages[stage], per_time)
        for start, _ in timeline.gaps(stage):
            first = round(start * per_time)
            if 0 < first < len(row) and row[first] == _IDLE:
                row[first] = "|"
        idle = f"idle {timeline.idle_ratio(stage):.1%}"
        lines.append(f"stage {stage:>{number_width}} {''.join(row)}| {idle}")
        for lane, copies in enumerate(timeline.copies[stage] if timeline.copies else ()):
            row = _row(timeline, copies, per_time)
            busy = f"busy {timeline.copying_ratio(stage, lane):.1%}"
            lines.append(f"{LANES[lane]:>{6 + number_width}} {''.join(row)}| {busy}")
    return "\n".join(lines) + "\n"


def _row(timeline: Timeline, spans: Iterable[Span], per_time: float) -> list[str]:
    cells = [_IDLE] * round(timeline.length * per_time)
    for span in spans:
        first, last = round(span.start * per_time), round(span.end * per_time)
        text = ("|" + _label(timeline, span))[: last - first].ljust(last - first)
        cells[first:last] = text
    return cells


def _label(timeline: Timeline, span: Span) -> str:
    if not span.action.kind.is_compute:
        return timeline.label(span.action)
    chunk = str(span.action.chunk) if timeline.num_chunks > 1 else ""
    return f"{chunk}{span.action.kind}{timeline.label(span.action)}"
