"""``seq1f1b timeline``: a schedule as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from seq1f1b.cli import options
from seq1f1b.cli.options import BalanceName, flag_error
from seq1f1b.cli.problem import as_timeline, make_schedule, make_shape, make_source, run
from seq1f1b.cli.source import TraceCosts
from seq1f1b.timeline import Timeline, chrome_trace, html_page, text_grid

ENDINGS = (".txt", ".svg", ".png", ".json", ".html")

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Where to draw: .txt, .svg, .png, .html (one page, with zoom), or .json (a trace for "
        "ui.perfetto.dev). Without it, text on the terminal.",
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        "--width",
        min=10,
        help="Columns of the text for the whole step. [default: so that every label fits]",
    ),
]


def timeline(
    stages: options.Stages = None,
    chunks: options.Chunks = None,
    microbatches: options.MicroBatches = None,
    splits: options.Splits = None,
    schedule: options.ScheduleOption = None,
    group: options.Group = None,
    max_live: options.MaxLive = None,
    output: Output = None,
    width: Width = None,
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
) -> None:
    """Draw a schedule; with --trace what was measured, and the plan on the same axis."""
    if output is not None and output.suffix not in ENDINGS:
        raise flag_error("--output", f"{output} must end in one of {', '.join(ENDINGS)}")
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
    shape = make_shape(source, stages, chunks, microbatches, splits)
    result = run(source, make_schedule(source, shape, schedule, group, max_live))
    timelines = [as_timeline(source, result)]
    if isinstance(source, TraceCosts):
        timelines.insert(0, source.timeline)
    if output is None:
        typer.echo(_text(timelines, width), nl=False)
        return
    draw(timelines, output, width)
    typer.echo(f"wrote {output}")


def draw(timelines: Sequence[Timeline], output: Path, width: int | None = None) -> None:
    """Draw into a file, as its ending says; a file that cannot be written ends the command."""
    try:
        _write(timelines, output, width)
    except OSError as error:
        raise flag_error("--output", f"{output}: cannot be written: {error}") from None


def _text(timelines: Sequence[Timeline], width: int | None) -> str:
    return "\n".join(text_grid(each, width) for each in timelines)


def _write(timelines: Sequence[Timeline], output: Path, width: int | None) -> None:
    match output.suffix:
        case ".txt":
            output.write_text(_text(timelines, width), encoding="utf-8")
        case ".json":
            output.write_text(json.dumps(chrome_trace(timelines)), encoding="utf-8")
        case ".html":
            output.write_text(html_page(timelines), encoding="utf-8")
        case _:
            from seq1f1b.timeline.figure import save_figure  # matplotlib takes a second to start

            save_figure(timelines, output)
