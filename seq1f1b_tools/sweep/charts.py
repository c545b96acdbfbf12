"""Throughput, memory, bubbles and losses of the runs as pictures."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from seq1f1b_tools.sweep.records import Summary
from seq1f1b_tools.sweep.report import Result

Panel = Callable[[Axes, Sequence[Result], dict[str, str]], None]

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
# told apart by colour-blind readers too (Okabe and Ito); grey is the baseline
_COLOURS = ("#8c8c8c", "#56b4e9", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#f0e442")
_LABELS = {"1f1b": "1F1B", "seq1f1b": "Seq1F1B", "interleaved": "interleaved"}
_WARNING = "#c00000"
_MAX_COLUMNS = 3
_MAX_LEVEL_LABELS = 4
_INCHES_PER_LETTER = 0.085


def draw_charts(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw a PNG of each kind into ``folder``; none if nothing has been measured."""
    shown = [result for result in results if result.status not in ("skipped", "not run")]
    if not any(result.summary for result in shown):
        return []
    files = []
    with plt.rc_context(_STYLE):
        for name, panel, title in (
            ("throughput.png", _throughput, "Throughput in tokens/s"),
            ("memory.png", _memory, "Peak activation memory in MiB"),
            ("bubble.png", _bubble, "Bubble ratio: idle time of a stage over the step"),
            ("loss.png", _loss, "Loss of every iteration"),
        ):
            figure = _figure(shown, panel, title)
            figure.savefig(folder / name, dpi=150)
            plt.close(figure)
            files.append(folder / name)
    return files


def _figure(results: Sequence[Result], panel: Panel, title: str) -> Figure:
    """Draw one panel per setting, the same colour for the same schedule in all of them."""
    settings = list(dict.fromkeys(result.run.setting for result in results))
    variants = list(dict.fromkeys(result.run.variant for result in results))
    colours = {v: _COLOURS[i % len(_COLOURS)] for i, v in enumerate(variants)}
    columns = 2 if len(settings) == 4 else min(len(settings), _MAX_COLUMNS)
    rows = -(-len(settings) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(max(6.0, 4.4 * columns), 3.1 * rows + 1.2),
        squeeze=False,
        layout="constrained",
    )
    for axes, setting in zip(grid.flat, settings, strict=False):
        group = [result for result in results if result.run.setting == setting]
        panel(axes, group, colours)
        axes.set_title(_title(group[0]))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(length=0)
        axes.margins(y=0.14)
    for axes in grid.flat[len(settings) :]:
        axes.set_axis_off()
    handles: list[Artist] = [Rectangle((0, 0), 1, 1, color=colours[v]) for v in variants]
    labels = [_label(v) for v in variants]
    if panel is _throughput:
        handles.append(Line2D([], [], color="black", linewidth=1.4, linestyle=(0, (2, 1))))
        labels.append("1F1B x speedup in theory")
    figure.suptitle(title, fontweight="bold")
    widths = [_INCHES_PER_LETTER * len(label) + 0.7 for label in labels]
    fits = sum(widths) < figure.get_figwidth()
    per_row = len(labels) if fits else max(1, int(figure.get_figwidth() / max(widths)))
    figure.legend(handles, labels, loc="outside lower center", ncols=per_row)
    return figure


def _throughput(axes: Axes, group: Sequence[Result], colours: dict[str, str]) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(_with_commas))
    for place, result in enumerate(group):
        if result.summary is None:
            axes.text(
                place,
                0.03,
                _missing(result),
                transform=axes.get_xaxis_transform(),
                rotation=90,
                ha="center",
                va="bottom",
                fontsize=9,
                color=_WARNING,
            )
            continue
        height = result.summary.tokens_per_second
        axes.bar(place, height, 0.72, color=colours[result.run.variant])
        text = f"{height:,.0f}"
        if result.baseline is not None and not result.run.is_baseline:
            text += f"\n{result.speedup:.2f}x"
            theory = result.baseline.tokens_per_second * result.run.speedup
            axes.hlines(
                theory,
                place - 0.36,
                place + 0.36,
                colors="black",
                linewidth=1.4,
                linestyles=(0, (2, 1)),
            )
        axes.text(
            place,
            height / 2,
            text if len(group) <= _MAX_LEVEL_LABELS else text.replace("\n", "   "),
            rotation=0 if len(group) <= _MAX_LEVEL_LABELS else 90,
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=_readable_on(colours[result.run.variant]),
        )
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(group) - 0.4)


def _memory(axes: Axes, group: Sequence[Result], colours: dict[str, str]) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(_with_commas))
    _by_stage(axes, group, colours, lambda summary: summary.peak_memory_mib, "{:,.0f}")
    _name_missing(axes, group)


def _bubble(axes: Axes, group: Sequence[Result], colours: dict[str, str]) -> None:
    _by_stage(axes, group, colours, lambda summary: summary.bubble_by_stage, "{:.3f}")
    _name_missing(axes, group)


def _loss(axes: Axes, group: Sequence[Result], colours: dict[str, str]) -> None:
    """Draw what is equal one on the other, the later ones with narrower lines."""
    for place, result in enumerate(group):
        if result.summary is None:
            continue
        losses = result.summary.losses
        axes.plot(
            range(1, len(losses) + 1),
            [math.nan if loss is None else loss for loss in losses],
            color=colours[result.run.variant],
            linewidth=1.2 + 1.1 * (len(group) - 1 - place),
            marker="o" if len(losses) == 1 else "",
        )
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _name_missing(axes, group)


def _by_stage(
    axes: Axes,
    group: Sequence[Result],
    colours: dict[str, str],
    values_of: Callable[[Summary], Sequence[float]],
    form: str,
) -> None:
    """Draw a group of bars for each stage, one bar for each run."""
    num_stages = group[0].run.pp
    width = 0.8 / len(group)
    for place, result in enumerate(group):
        offset = (place - (len(group) - 1) / 2) * width
        if result.summary is None:
            continue
        values = values_of(result.summary)
        bars = axes.bar(
            [stage + offset for stage in range(num_stages)],
            values,
            width * 0.94,
            color=colours[result.run.variant],
        )
        if num_stages * len(group) <= 12:
            axes.bar_label(bars, [form.format(value) for value in values], fontsize=8, padding=2)
    axes.set_xticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)])
    if num_stages > 4:
        axes.set_xticks(range(num_stages), map(str, range(num_stages)))
        axes.set_xlabel("stage")


def _name_missing(axes: Axes, group: Sequence[Result]) -> None:
    absent = [f"{_label(r.run.variant)}: {_missing(r)}" for r in group if r.summary is None]
    axes.text(
        0.99,
        0.99,
        "\n".join(absent),
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9,
        color=_WARNING,
    )


def _with_commas(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _missing(result: Result) -> str:
    return "OOM" if result.status == "oom" else result.status


def _readable_on(colour: str) -> str:
    """White on dark colours, black on light ones."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.58 else "black"


def _title(result: Result) -> str:
    run = result.run
    parallel = f"PP {run.pp}" if run.tp == 1 else f"TP {run.tp} x PP {run.pp}"
    return f"{run.model.name}, {run.seq_length:,} tokens, {parallel}, m = {run.num_micro_batches}"


def _label(variant: str) -> str:
    """Spell a variant's name out: seq1f1b-s4-average becomes Seq1F1B s4 average."""
    return " ".join(_LABELS.get(word, word) for word in variant.split("-"))
