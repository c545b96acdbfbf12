"""``seq1f1b compare``: schedules side by side."""

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from seq1f1b.cli import megatron, options, report
from seq1f1b.cli.megatron import read_given
from seq1f1b.cli.options import flag_error
from seq1f1b.cli.problem import CHUNKS, Device, Shape, make_shape, make_source, run
from seq1f1b.cli.source import Source, TraceCosts
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.layout import LayoutError

_MOST_ACTIONS_OF_GREEDY = 20_000

SplitsList = Annotated[
    str | None,
    typer.Option(
        "--splits",
        "--seq1f1b-splits",
        metavar="N[,N...]",
        help="Sub-sequences of a micro-batch; several numbers make a row each. [default: 4]",
        rich_help_panel="Pipeline",
    ),
]


def compare(
    ctx: typer.Context,
    model: megatron.Model = None,
    gpu: megatron.GpuName = None,
    gpus: megatron.Gpus = None,
    gpus_per_node: megatron.GpusPerNode = None,
    microbatches: options.MicroBatches = None,
    splits: SplitsList = None,
    group: options.Group = None,
    backward_ratio: options.BackwardRatio = 2.0,
    tflops: options.Tflops = None,
    latency: options.Latency = None,
    bandwidth: options.Bandwidth = None,
    trace: options.Trace = None,
    as_json: options.Json = False,
) -> None:
    """Compare all schedules of a shape, the fastest first: step, bubble, and what each stage holds.

    Interleaved schedules have 2 model chunks a stage unless options say more. The greedy schedule
    is searched for shapes of moderate size, in the memory that 1F1B takes there or in --max-live.
    Costs are those of a model on a GPU (Megatron's options, or --model), of a trace, or equal for
    all stages and sub-sequences.

    peak_live counts sub-sequences of the row's own split, on one model chunk each, between their
    forward and backward: divided by chunks and splits, it is in whole micro-batches.
    """
    given = read_given(ctx.args, model)
    device = Device(gpu, gpus, gpus_per_node, tflops, backward_ratio, latency, bandwidth)
    source = make_source(given, microbatches, trace, device)
    counts = _split_counts(splits, source)
    shape = make_shape(source, given, microbatches)
    says_chunks = any(given.values.get(name) is not None for name in CHUNKS)
    if not says_chunks and not isinstance(source, TraceCosts):
        shape = Shape(shape.stages, 2, shape.micro_batches, shape.splits)
    left_out: list[str] = []
    rows = []
    for name, each in _candidates(shape, counts, left_out):
        turns = group if name.has_chunks else None
        cap = given.values.get("seq1f1b_max_live") if name is ScheduleName.GREEDY else None
        try:
            schedule = each.generate(source, name, turns, cap)
            rows.append(report.figures(source, run(source, schedule)))
        except (SettingError, LayoutError) as error:
            left_out.append(f"{name} with {each.chunks} chunk(s): {'; '.join(_faults(error))}")
    rows.sort(key=lambda row: row["step_time"])
    if as_json:
        report.write_json(rows)
    else:
        _print(source, rows)
        for text in (*left_out, *_too_short(rows)):
            report.console().print(text, style="dim")
        report.print_notes(source, given)


def _faults(error: Exception) -> list[str]:
    return list(error.faults) if isinstance(error, SettingError) else [str(error)]


def _split_counts(text: str | None, source: Source) -> list[int]:
    if text is None:
        return [source.schedule.num_splits if isinstance(source, TraceCosts) else 4]
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() and 0 < int(number[:10]) < 10**9 for number in numbers):
        raise flag_error("--splits", f"{text!r} is not a list of numbers from 1, such as 1,2,4")
    return sorted({int(number) for number in numbers})


def _candidates(
    shape: Shape, split_counts: list[int], left_out: list[str]
) -> Iterator[tuple[ScheduleName, Shape]]:
    """Yield every schedule that the shape allows, whole micro-batches first."""
    chunk_counts = [1] + [shape.chunks] * (shape.chunks > 1 and shape.stages > 1)
    for splits in [1, *(splits for splits in split_counts if splits > 1)]:
        for name in ScheduleName:
            for chunks in chunk_counts:
                if not name.allows(chunks, splits):
                    continue
                if name is ScheduleName.GPIPE and splits > 1:
                    continue
                each = Shape(shape.stages, chunks, shape.micro_batches, splits)
                if name is ScheduleName.GREEDY and each.num_actions > _MOST_ACTIONS_OF_GREEDY:
                    left_out.append(
                        f"greedy with {splits} splits and {chunks} chunk(s) is left out: its "
                        "search takes long; simulate --schedule greedy does it"
                    )
                    continue
                yield name, each


def _too_short(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a warning for sub-sequences that cost more than they save."""
    for row in rows:
        alike = [
            other
            for other in rows
            if other["schedule"] == row["schedule"]
            and other["chunks"] == row["chunks"]
            and 1 < other["splits"] < row["splits"]
            and other["step_time"] < row["step_time"]
        ]
        if alike:
            best = min(alike, key=lambda other: other["step_time"])
            yield (
                f"warning: {row['schedule']} with {row['splits']} splits: sub-sequences are too "
                f"short to pay; {best['splits']} are faster"
            )


def _print(source: Source, rows: list[dict[str, Any]]) -> None:
    plain = next((row for row in rows if row["schedule"] == ScheduleName.PLAIN), rows[0])
    table = Table(header_style="bold", box=None, padding=(0, 1), pad_edge=False)
    table.add_column("schedule", no_wrap=True)
    for title in ("splits", "chunks", "step", "vs 1f1b", "bubble", "theory", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        theory = row["bubble_ratio_in_theory"]
        held = [report.memory_text(source, peak) for peak in row["peak_memory"]]
        table.add_row(
            row["schedule"],
            str(row["splits"]),
            str(row["chunks"]),
            report.time_text(source, row["step_time"]),
            f"{plain['step_time'] / row['step_time']:.3f}x",
            f"{row['bubble_ratio']:.1%}",
            "-" if theory is None else f"{theory:.1%}",
            f"{held[0]}..{held[-1]}",
        )
    console = report.console()
    console.print(table)
    console.print(
        f"memory: the most that the first and the last stage hold, in {report.memory_title(source)}"
        f"{'' if source.seconds else '; times in forwards of a stage on one micro-batch'}",
        style="dim",
    )
