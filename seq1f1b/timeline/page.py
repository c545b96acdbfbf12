"""Timelines as one HTML page that needs nothing else."""

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from seq1f1b.schedule import Span
from seq1f1b.timeline import palette
from seq1f1b.timeline.model import Timeline

_DATA = "/*DATA*/null"


def html_page(timelines: Sequence[Timeline], title: str = "Pipeline schedule") -> str:
    """Return a page that shows ``timelines`` on the same time axis, with zoom and hover."""
    template = files("seq1f1b.timeline").joinpath("page.html").read_text(encoding="utf-8")
    data = {"title": title, "timelines": [_data(timeline) for timeline in timelines]}
    # "</" would end the script that the data stands in
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    assert template.count(_DATA) == 1, "page.html has one place for its data"
    return template.replace(_DATA, text)


def _data(timeline: Timeline) -> dict[str, Any]:
    """Return what the page's script reads; a span is an array to keep the file small."""
    num_splits = timeline.num_splits
    colors: dict[str, int] = {}

    def rows(spans: Iterable[Span]) -> list[list[Any]]:
        found = []
        for action, start, end in spans:
            color = f"{palette.fill(action, num_splits)} {palette.ink(action)}"
            number = colors.setdefault(color, len(colors))
            kind, chunk, micro_batch, sub_sequence = action
            found.append([kind.value, chunk, micro_batch, sub_sequence, start, end, number])
        return found

    stages = [rows(spans) for spans in timeline.stages]
    copies = [[rows(lane) for lane in lanes] for lanes in timeline.copies]
    return {
        "name": timeline.name,
        "seconds": timeline.seconds,
        "length": timeline.length,
        "bubble": timeline.bubble_ratio,
        "idle": [timeline.idle_ratio(stage) for stage in range(len(timeline.stages))],
        "gaps": [timeline.gaps(stage) for stage in range(len(timeline.stages))],
        "chunks": timeline.num_chunks,
        "splits": num_splits,
        "colors": [color.split() for color in colors],
        "stages": stages,
        "copies": copies,
        "copying": [
            [timeline.copying_ratio(stage, lane) for lane in range(len(lanes))]
            for stage, lanes in enumerate(timeline.copies)
        ],
        "memory": timeline.memory,
        "memoryUnit": timeline.memory_unit,
    }
