"""``seq1f1b simulate``: one schedule in figures."""

from typing import Any

import typer
from rich.table import Table

from seq1f1b.cli import megatron, offload, options, report
from seq1f1b.cli.megatron import read_given
from seq1f1b.cli.problem import Device, make_schedule, make_shape, make_source, run
from seq1f1b.cli.source import SettingCosts, Source, TraceCosts
from seq1f1b.simulate import Simulation, peak_memory


def simulate(
    ctx: typer.Context,
    model: megatron.Model = None,
    gpu: megatron.GpuName = None,
    gpus: megatron.Gpus = None,
    gpus_per_node: megatron.GpusPerNode = None,
    microbatches: options.MicroBatches = None,
    schedule: options.ScheduleOption = None,
    group: options.Group = None,
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
    as_json: options.Json = False,
) -> None:
    """Time one schedule: its step, and idle time and memory of every stage.

    Costs are those of a model on a GPU (Megatron's options, or --model), of a trace, or equal for
    all stages and sub-sequences.
    """
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
    if as_json:
        figures = report.figures(source, result)
        if isinstance(source, TraceCosts):
            figures["measured_step_time"] = source.timeline.length
            figures["measured_bubble_ratio"] = source.timeline.bubble_ratio
        report.write_json(figures | report.notes(source, given))
    else:
        _print(source, result)
        report.print_notes(source, given, visits=planned.slots is not None)


def _print(source: Source, result: Simulation) -> None:
    figures = report.figures(source, result)
    theory = figures["bubble_ratio_in_theory"]
    equal = "" if theory is None else f" (equal actions: {theory:.2%})"
    console = report.console()
    console.print(
        f"[bold]{figures['schedule']}[/]  {figures['stages']} stages, {figures['chunks']} "
        f"model chunk(s) each, {figures['microbatches']} micro-batches of {figures['splits']} "
        f"sub-sequence(s)"
    )
    console.print(
        f"step {report.time_text(source, result.step_time)}, bubble ratio "
        f"{result.bubble_ratio:.2%}{equal}"
    )
    if isinstance(source, SettingCosts):
        lengths = source.setting(result.schedule).lengths
        if len(lengths) > 1:
            console.print(f"sub-sequences of {', '.join(map(str, lengths))} tokens")
    if isinstance(source, TraceCosts):
        console.print(
            f"measured: step {report.time_text(source, source.timeline.length)}, bubble ratio "
            f"{source.timeline.bubble_ratio:.2%}"
        )
    table = Table(header_style="bold", box=None, pad_edge=False)
    titles = ["stage", "busy", "idle", "idle %", "peak live", f"peak {report.memory_title(source)}"]
    if "chunk_loads" in figures:
        titles += ["loads", "copies in", "copies out"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    peaks = peak_memory(result, source.memory(result.schedule))
    for stage, (busy, idle) in enumerate(zip(result.busy, result.idle, strict=True)):
        table.add_row(
            str(stage),
            report.time_text(source, busy),
            report.time_text(source, idle),
            f"{idle / result.step_time:.1%}",
            str(result.peak_live[stage]),
            report.memory_text(source, peaks[stage]),
            *_copies(source, figures, stage),
        )
    console.print(table)
    console.print(
        "peak live: sub-sequences, on one model chunk each, between their forward and backward",
        style="dim",
    )


def _copies(source: Source, figures: dict[str, Any], stage: int) -> list[str]:
    if "chunk_loads" not in figures:
        return []
    times = (report.time_text(source, seconds) for seconds in figures["copying"][stage])
    return [str(figures["chunk_loads"][stage]), *times]
