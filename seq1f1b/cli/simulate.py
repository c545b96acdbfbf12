"""``seq1f1b simulate``: one schedule in figures."""

from rich.console import Console
from rich.table import Table

from seq1f1b.cli import options, report
from seq1f1b.cli.options import BalanceName
from seq1f1b.cli.problem import make_schedule, make_shape, make_source, run
from seq1f1b.cli.source import Source, TraceCosts
from seq1f1b.simulate import Simulation, peak_memory


def simulate(
    stages: options.Stages = None,
    chunks: options.Chunks = None,
    microbatches: options.MicroBatches = None,
    splits: options.Splits = None,
    schedule: options.ScheduleOption = None,
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
    """Time one schedule: its step, and idle time and memory of every stage."""
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
    if as_json:
        figures = report.figures(source, result)
        if isinstance(source, TraceCosts):
            figures["measured_step_time"] = source.timeline.length
            figures["measured_bubble_ratio"] = source.timeline.bubble_ratio
        report.write_json(figures)
    else:
        _print(source, result)


def _print(source: Source, result: Simulation) -> None:
    figures = report.figures(source, result)
    theory = figures["bubble_ratio_in_theory"]
    equal = "" if theory is None else f" (equal actions: {theory:.2%})"
    console = Console(highlight=False)
    console.print(
        f"[bold]{figures['schedule']}[/]  {figures['stages']} stages, {figures['chunks']} "
        f"model chunk(s) each, {figures['microbatches']} micro-batches of {figures['splits']} "
        f"sub-sequence(s)"
    )
    console.print(
        f"step {report.time_text(source, result.step_time)}, bubble ratio "
        f"{result.bubble_ratio:.2%}{equal}"
    )
    if isinstance(source, TraceCosts):
        console.print(
            f"measured: step {report.time_text(source, source.timeline.length)}, bubble ratio "
            f"{source.timeline.bubble_ratio:.2%}"
        )
    table = Table(header_style="bold", box=None, pad_edge=False)
    titles = ("stage", "busy", "idle", "idle %", "peak live", f"peak {report.memory_title(source)}")
    for title in titles:
        table.add_column(title, justify="right")
    peaks = peak_memory(result, source.memory(result.schedule))
    for stage, (busy, idle) in enumerate(zip(result.busy, result.idle, strict=True)):
        table.add_row(
            str(stage),
            report.time_text(source, busy),
            report.time_text(source, idle),
            f"{idle / result.step_time:.1%}",
            str(result.peak_live[stage]),
            report.memory_text(source, peaks[stage]),
        )
    console.print(table)
    console.print(
        "peak live: sub-sequences, on one model chunk each, between their forward and backward",
        style="dim",
    )
