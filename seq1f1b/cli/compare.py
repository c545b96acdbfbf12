"""``seq1f1b compare``: schedules side by side."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from seq1f1b.cli import options, report
from seq1f1b.cli.options import BalanceName, flag_error
from seq1f1b.cli.problem import Shape, make_shape, make_source, run
from seq1f1b.cli.source import Source, TraceCosts
from seq1f1b.planner.catalogue import ScheduleName

SplitsList = Annotated[
    str | None,
    typer.Option(
        "--splits",
        metavar="N[,N...]",
        help="Sub-sequences of a micro-batch; several numbers make a row each. [default: 4]",
        rich_help_panel="Pipeline",
    ),
]


def compare(
    stages: options.Stages = None,
    chunks: options.Chunks = None,
    microbatches: options.MicroBatches = None,
    splits: SplitsList = None,
    group: options.Group = None,
    max_live: options.MaxLive = None,
    seq_length: options.SeqLength = None,
    hidden_size: options.HiddenSize = None,
    layers: options.Layers = None,
    heads: options.Heads = None,
    query_groups: options.QueryGroups = None,
    ffn_hidden_size: options.FfnHiddenSize = None,
    micro_batch_size: options.MicroBatchSize = 1,
    balance_method: options.BalanceMethod = BalanceName.average,
    multiple: options.Multiple = 1,
    backward_ratio: options.BackwardRatio = 2.0,
    tflops: options.Tflops = 100.0,
    latency: options.Latency = 0.0,
    bandwidth: options.Bandwidth = None,
    trace: options.Trace = None,
    as_json: options.Json = False,
) -> None:
    """Compare all schedules of a shape: step time, bubble ratio, and what each stage holds.

    Interleaved schedules have --chunks model chunks a stage, 2 unless given. The greedy schedule
    is searched for every shape, in the memory that 1F1B takes there or in --max-live.

    peak_live counts sub-sequences of the row's own split, on one model chunk each, between their
    forward and backward: divided by chunks and splits, it is in whole micro-batches.
    """
    source = make_source(
        trace=trace,
        seq_length=seq_length,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        query_groups=query_groups,
        ffn_hidden_size=ffn_hidden_size,
        micro_batch_size=micro_batch_size,
        balance_method=balance_method,
        multiple=multiple,
        backward_ratio=backward_ratio,
        tflops=tflops,
        latency=latency,
        bandwidth=bandwidth,
    )
    counts = _split_counts(splits, source)
    if chunks is None and not isinstance(source, TraceCosts):
        chunks = 2
    shape = make_shape(source, stages, chunks, microbatches, None)
    rows = []
    for name, each in _candidates(shape, counts):
        turns = group if name.has_chunks else None
        cap = max_live if name is ScheduleName.GREEDY else None
        schedule = each.generate(source, name, turns, cap)
        rows.append(report.figures(source, run(source, schedule)))
    if as_json:
        report.write_json(rows)
    else:
        _print(source, rows)


def _split_counts(text: str | None, source: Source) -> list[int]:
    if text is None:
        return [source.schedule.num_splits if isinstance(source, TraceCosts) else 4]
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise flag_error("--splits", f"{text!r} is not a list of numbers from 1, such as 1,2,4")
    return sorted({int(number) for number in numbers})


def _candidates(shape: Shape, split_counts: list[int]) -> list[tuple[ScheduleName, Shape]]:
    """Return every schedule that the shape allows, whole micro-batches first."""
    chunk_counts = [1] + [shape.chunks] * (shape.chunks > 1 and shape.stages > 1)
    return [
        (name, Shape(shape.stages, chunks, shape.micro_batches, splits))
        for splits in [1, *(splits for splits in split_counts if splits > 1)]
        for name in ScheduleName
        for chunks in chunk_counts
        if name.allows(chunks, splits) and (name is not ScheduleName.GPIPE or splits == 1)
    ]


def _print(source: Source, rows: list[dict[str, Any]]) -> None:
    plain = next(row for row in rows if row["schedule"] == ScheduleName.PLAIN)
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
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"memory: the most that the first and the last stage hold, in {report.memory_title(source)}"
        f"{'' if source.seconds else '; times in forwards of a stage on one micro-batch'}",
        style="dim",
    )
