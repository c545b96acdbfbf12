"""``seq1f1b timeline``: a schedule as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from seq1f1b.cli import megatron, offload, options
from seq1f1b.cli.megatron import read_given
from seq1f1b.cli.options import check_output, flag_error
from seq1f1b.cli.problem import Device, as_timeline, make_schedule, make_shape, make_source, run
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
    ctx: typer.Context,
    model: megatron.Model = None,
    gpu: megatron.GpuName = None,
    gpus: megatron.Gpus = None,
    gpus_per_node: megatron.GpusPerNode = None,
    microbatches: options.MicroBatches = None,
    schedule: options.ScheduleOption = None,
    group: options.Group = None,
    output: Output = None,
    width: Width = None,
    backward_ratio: options.BackwardRatio = 2.0,
    tflops: options.Tflops = None,
    latency: options.Latency = None,
    bandwidth: options.Bandwidth = None,
    offload_chunks: offload.Chunks = 0,
    offload_prefetch: offload.Prefetch = False,
    offload_rate: offload.GbPerSecond = None,
    offload_copy_time: offload.CopyTime = None,
    offload_roots: offload.Roots = None,
    trace: options.Trace = None,
) -> None:
    """Draw a schedule; with --trace what was measured, and the plan on the same axis.

    Costs are those of a model on a GPU (Megatron's options, or --model), of a trace, or equal for
    all stages and sub-sequences.
    """
    if output is not None:
        check_output("--output", output, ENDINGS)
    given = read_given(ctx.args, model)
    device = Device(gpu, gpus, gpus_per_node, tflops, backward_ratio, latency, bandwidth)
    source = make_source(given, microbatches, trace, device)
    shape = make_shape(source, given, microbatches)
    max_live = given.values.get("seq1f1b_max_live")
    visits = offload.Offload(
        offload_chunks, offload_prefetch, offload_rate, offload_copy_time, offload_roots
    )
    turn = visits.turn(shape, schedule, group)
    planned = visits.applied(make_schedule(source, shape, schedule, turn, max_live))
    result = run(source, planned, visits.host_link(source, planned))
    timelines = [as_timeline(source, result)]
    if isinstance(source, TraceCosts):
        timelines.insert(0, source.timeline)
    if output is None:
        typer.echo(_text(timelines, width), nl=False)
        return
    draw(timelines, output, "--output", width)
    typer.echo(f"wrote {output}")


def draw(timelines: Sequence[Timeline], output: Path, flag: str, width: int | None = None) -> None:
    """Draw into the file of ``flag``, as its ending says; a failure to write ends the command."""
    try:
        _write(timelines, output, width)
    except OSError as error:
        raise flag_error(flag, f"{output}: cannot be written: {error}") from None


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
