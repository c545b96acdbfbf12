"""Timelines as a picture, SVG or PNG, by matplotlib."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from seq1f1b.schedule import Action, Kind, Span
from seq1f1b.timeline import palette
from seq1f1b.timeline.model import LANES, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW_INCHES = 0.42
_MEMORY_INCHES = 1.5
_BAR_HEIGHT = 0.86
_LANE_PITCH, _LANE_HEIGHT, _LANE_GAP = 0.36, 0.3, 0.12
"""Of a row of copies, in rows of a stage, and the gap before the next stage."""
_SMALL = 6.5
_POINTS_PER_LETTER = 4.4
_MOST_NAMED_CURVES = 10
_GRAY = "#6b7280"
_IDLE = "#eef0f4"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": "#c9ced8",
    "axes.linewidth": 0.8,
    "xtick.color": _GRAY,
    "ytick.color": "#374151",
    "svg.fonttype": "none",
    "svg.hashsalt": "seq1f1b",
    "hatch.linewidth": 0.6,
}


def save_figure(timelines: Sequence[Timeline], path: Path, *, width: float = 14.0) -> None:
    """Draw ``timelines`` one above the other on the same time axis into an .svg or .png file.

    ``width`` is in inches. Each stage is a row; what is idle stays gray, with its share of the step
    at the right. Where model chunks visit the device, two thin rows below it are the copies into it
    and out of it. Below, where it is known, what every stage holds in memory.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        heights = []
        for timeline in timelines:
            heights.append(len(timeline.stages) * _pitch(timeline) * _ROW_INCHES)
            heights += [_MEMORY_INCHES] if timeline.memory else []
        gap = 0.62
        figure = Figure(figsize=(width, sum(heights) + gap * len(heights) + 0.5))
        panels = figure.subplots(
            len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
        )[:, 0]
        total = figure.get_size_inches()[1]
        figure.subplots_adjust(
            left=0.75 / width,
            right=1 - 0.75 / width,
            top=1 - 0.62 / total,
            bottom=0.5 / total,
            hspace=gap * len(heights) / sum(heights),
        )
        length = max(timeline.length for timeline in timelines)
        free = iter(panels)
        for timeline in timelines:
            _draw_stages(next(free), timeline, length, figure)
            if timeline.memory:
                _draw_memory(next(free), timeline, length)
        panels[-1].set_xlabel(_time_label(timelines), color=_GRAY)
        _draw_legend(figure, timelines)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata, facecolor="white")


def _draw_stages(axes: "Axes", timeline: Timeline, length: float, figure: "Figure") -> None:
    from matplotlib.collections import PolyCollection

    num_stages = len(timeline.stages)
    pitch = _pitch(timeline)
    axes.set(xlim=(0, length or 1), ylim=(num_stages * pitch - 0.5, -0.5))
    points = axes.get_position().width * figure.get_size_inches()[0] * 72 / (length or 1)
    boxes, colors, stripes = [], [], []
    rows = list(_rows(timeline))
    for row in rows:
        axes.axhspan(
            row.middle - row.height / 2, row.middle + row.height / 2, color=_IDLE, linewidth=0,
            zorder=0,
        )  # fmt: skip
        for span in row.spans:
            boxes.append(_box(span, row, 1.0))
            colors.append(palette.fill(span.action, timeline.num_splits))
            if row.is_stage and span.action.chunk > 0:
                stripes.append(_box(span, row, span.action.chunk / timeline.num_chunks * 0.36))
            _write_label(axes, timeline, span, row, points)
        axes.text(
            1.006, row.middle, row.note, transform=axes.get_yaxis_transform(), va="center",
            color=_GRAY, fontsize=8 if row.is_stage else _SMALL,
        )  # fmt: skip
    edge = 0.5 if len(boxes) < 3000 else 0.0
    axes.add_collection(
        PolyCollection(boxes, facecolors=colors, edgecolors="white", linewidths=edge, zorder=1)
    )
    axes.add_collection(
        PolyCollection(stripes, facecolors="#11182755", edgecolors="none", zorder=2)
    )
    stages, lanes = ([row for row in rows if row.is_stage is kind] for kind in (True, False))
    axes.set_yticks([row.middle for row in stages], [row.name for row in stages])
    axes.set_yticks([row.middle for row in lanes], [row.name for row in lanes], minor=True)
    axes.tick_params(axis="both", which="both", length=0, labelbottom=True)
    axes.tick_params(axis="y", which="minor", labelsize=_SMALL, labelcolor=_GRAY)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.set_title(
        f"{timeline.name}    step {timeline.time(timeline.length)}    "
        f"bubble ratio {timeline.bubble_ratio:.1%}",
        loc="left",
        fontsize=11,
        fontweight="bold",
        color="#111827",
    )


class _Row(NamedTuple):
    """A row of bars: its middle and height in rows of a stage, and what stands beside it."""

    spans: tuple[Span, ...]
    middle: float
    height: float
    name: str
    note: str
    is_stage: bool


def _pitch(timeline: Timeline) -> float:
    """Return how many rows a stage takes, with its copies."""
    return 1.0 + (len(LANES) * _LANE_PITCH + _LANE_GAP if timeline.copies else 0.0)


def _rows(timeline: Timeline) -> Iterator[_Row]:
    for stage, spans in enumerate(timeline.stages):
        middle = stage * _pitch(timeline)
        idle = f"{timeline.idle_ratio(stage):.1%} idle"
        yield _Row(spans, middle, _BAR_HEIGHT, f"stage {stage}", idle, True)
        for lane, copies in enumerate(timeline.copies[stage] if timeline.copies else ()):
            below = middle + 0.5 + (lane + 0.5) * _LANE_PITCH
            busy = f"{timeline.copying_ratio(stage, lane):.1%} busy"
            yield _Row(copies, below, _LANE_HEIGHT, LANES[lane], busy, False)


def _box(span: Span, row: _Row, part: float) -> list[tuple[float, float]]:
    """Return the corners of a bar, or of the lowest ``part`` of it."""
    bottom = row.middle + row.height / 2
    top = bottom - row.height * part
    return [(span.start, bottom), (span.start, top), (span.end, top), (span.end, bottom)]


def _write_label(axes: "Axes", timeline: Timeline, span: Span, row: _Row, points: float) -> None:
    room = (span.end - span.start) * points
    label = timeline.label(span.action)
    upright = len(label) * _POINTS_PER_LETTER + 2 > room
    if room < _POINTS_PER_LETTER * 1.6 or (upright and not row.is_stage):
        return
    axes.text(
        (span.start + span.end) / 2, row.middle, label, ha="center",
        va="center" if row.is_stage else "center_baseline",
        fontsize=min(8.0 if row.is_stage else _SMALL, room * 0.9), rotation=90 if upright else 0,
        color=palette.ink(span.action), zorder=3, clip_on=True,
    )  # fmt: skip


def _draw_memory(axes: "Axes", timeline: Timeline, length: float) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"]
    num_stages = len(timeline.memory)
    named_every = -(-num_stages // _MOST_NAMED_CURVES)
    divisor, unit = _readable(timeline)
    for stage, curve in enumerate(timeline.memory):
        color = colors(0.05 + 0.8 * stage / max(num_stages - 1, 1))
        times = [0.0, *(time for time, _ in curve), length]
        held = [0.0, *(value / divisor for _, value in curve), 0.0]
        peak = max(held)
        axes.step(
            times, held, where="post", color=color, linewidth=1.4,
            label="" if stage % named_every else f"{stage}: {peak:.4g}",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="both", length=0, labelbottom=True)
    axes.set_title(f"memory, {unit}", loc="left", fontsize=9, color=_GRAY)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7, title="peak",
        title_fontsize=7, handlelength=1.0, borderaxespad=0.2,
    )  # fmt: skip


def _readable(timeline: Timeline) -> tuple[float, str]:
    """Return what to divide memory by and the unit of the result."""
    most = max((held for curve in timeline.memory for _, held in curve), default=0.0)
    if timeline.memory_unit != "bytes" or most < 2**10:
        return 1.0, timeline.memory_unit
    power = min(int(math.log2(most)) // 10, 4)
    return float(2 ** (10 * power)), ("KiB", "MiB", "GiB", "TiB")[power - 1]


def _draw_legend(figure: "Figure", timelines: Sequence[Timeline]) -> None:
    from matplotlib.patches import Patch

    kinds = {span.action.kind for line in timelines for spans in line.stages for span in spans}
    names = {
        Kind.F: "forward",
        Kind.B: "backward",
        Kind.I: "input gradient",
        Kind.W: "weight gradient",
    }
    entries = [
        Patch(facecolor=palette.fill(Action(kind, 0, 0, 0), 1), label=name)
        for kind, name in names.items()
        if kind in kinds
    ]
    copies = [
        span.action
        for line in timelines
        for lanes in line.copies
        for lane in lanes
        for span in lane
    ]
    for name, is_load in (("chunk loaded", True), ("gradients out", False)):
        found = [action for action in copies if action.kind.is_load is is_load]
        entries += [Patch(facecolor=palette.fill(action, 1), label=name) for action in found[:1]]
    entries.append(Patch(facecolor=_IDLE, label="idle"))
    num_chunks = max(timeline.num_chunks for timeline in timelines)
    if num_chunks > 1:
        entries.append(Patch(facecolor="#11182755", label="stripe: later model chunk"))
    figure.legend(
        handles=entries, loc="upper right", ncols=len(entries), frameon=False, fontsize=8,
        bbox_to_anchor=(1 - 0.75 / figure.get_size_inches()[0], 1.0), handlelength=1.2,
    )  # fmt: skip


def _time_label(timelines: Sequence[Timeline]) -> str:
    if timelines[0].seconds:
        return "seconds"
    return "time, in forwards of a stage on one micro-batch"
