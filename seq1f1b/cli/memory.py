"""``seq1f1b memory``: what one setting needs on every stage."""

from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from seq1f1b.cli import megatron, report
from seq1f1b.cli.megatron import or_exit, read_given, read_setting
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.command_line import write_options
from seq1f1b.planner.gpu import Gpu
from seq1f1b.planner.gpu import gpu as load_gpu
from seq1f1b.planner.memory import GIB, MemoryTrace, trace_memory
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.runtime import runtime as load_runtime
from seq1f1b.planner.setting import Setting, megatron_values

_REPORTS = "seq1f1b.memory_reports"


class RuntimeName(StrEnum):
    """Whose tensors and allocator."""

    current = "current"
    megatron_2023 = "megatron-2023"
    cpu = "cpu"


def memory(
    ctx: typer.Context,
    model: megatron.Model = None,
    schedule: Annotated[
        ScheduleName | None,
        typer.Option(
            help="Which schedule; by chunks and splits unless given.", rich_help_panel="Schedule"
        ),
    ] = None,
    runtime: Annotated[
        RuntimeName | None,
        typer.Option(
            help="Software whose memory is modelled: current, or the authors' release of 2023. "
            "[default: current, or the GPU's]",
            show_default=False,
            rich_help_panel="Cluster",
        ),
    ] = None,
    gpu: megatron.GpuName = None,
    gpus: megatron.Gpus = None,
    beside: Annotated[
        bool | None,
        typer.Option(
            "--megatron/--no-megatron",
            help="Print Megatron's own estimate too, which takes some seconds. [default: in the "
            "table, not in JSON]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the memory of every stage under one setting: allocated, and reserved by the allocator.

    The setting is given by Megatron's options. Every tensor of the schedule is followed through the
    rules of torch's caching allocator. Counted are parameters, gradients, optimizer states,
    activations, keys and values of earlier sub-sequences, and temporaries; not counted are the CUDA
    context, NCCL's buffers and what a data loader holds, which a GPU's usable memory leaves out.
    """
    given = read_given(ctx.args, model)
    setting = read_setting(given, gpus=gpus, schedule=schedule)
    device = or_exit(lambda: load_gpu(gpu)) if gpu is not None else None
    name = runtime or (device.runtime if device else RuntimeName.current)
    profile = or_exit(lambda: load_runtime(str(name)))
    trace = or_exit(lambda: trace_memory(setting, profile))
    asks = beside if beside is not None else not as_json
    other = _megatrons_estimate(setting) if asks else None
    figures = _figures(setting, profile, device, trace, given.ignored, other)
    if as_json:
        report.write_json(figures)
    else:
        _print(setting, figures)


def _figures(
    setting: Setting,
    profile: Runtime,
    device: Gpu | None,
    trace: MemoryTrace,
    ignored: tuple[str, ...],
    other: dict[str, float] | None,
) -> dict[str, Any]:
    limit = device.usable_gib.value if device else None
    figures: dict[str, Any] = {
        "schedule": str(setting.schedule_name),
        "runtime": profile.name,
        "gpus": setting.num_gpus,
        "microbatches": setting.num_micro_batches,
        "lengths": list(setting.lengths),
        "stages": [
            {
                "allocated_gib": stage.allocated / GIB,
                "reserved_gib": stage.reserved / GIB,
                "static_gib": stage.static / GIB,
                "activations_gib": stage.activations / GIB,
            }
            for stage in trace.stages
        ],
        "fullest_stage": trace.fullest,
        "peak_reserved_gib": trace.peak_gib,
        "limit_gib": limit,
        "limit": f"{device.name}: {device.usable_gib.source}" if device else None,
        "fits": None if limit is None else trace.peak_gib <= limit,
        "spare_gib": None if limit is None else limit - trace.peak_gib,
        "assumed": list(setting.assumed),
        "without_effect": list(ignored),
    }
    if other is not None:
        figures["megatron_gib"] = other
    return figures


def _megatrons_estimate(setting: Setting) -> dict[str, float] | None:
    """Ask the adaptor, if it is installed, for what Megatron itself estimates."""
    for entry in entry_points(group=_REPORTS):
        ask: Callable[[list[str], int], dict[str, float]] = entry.load()
        try:
            return ask(write_options(megatron_values(setting)), setting.num_gpus)
        except ValueError as error:
            typer.echo(f"seq1f1b: no estimate of Megatron's own: {error}", err=True)
    return None


def _print(setting: Setting, figures: dict[str, Any]) -> None:
    console = report.console()
    console.print(
        f"[bold]{figures['schedule']}[/]  {figures['gpus']} GPUs, {setting.num_stages} stages x "
        f"{setting.num_chunks} chunk(s), {figures['microbatches']} micro-batches"
    )
    if setting.num_splits > 1:
        console.print(f"sub-sequences of {', '.join(map(str, figures['lengths']))} tokens")
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("stage", "layers", "weights, optimizer", "activations", "allocated", "reserved"):
        table.add_column(title, justify="right", no_wrap=True)
    for number, stage in enumerate(figures["stages"]):
        table.add_row(
            str(number),
            str(sum(len(chunk.layers) for chunk in setting.chunks[number])),
            *(
                f"{stage[name]:.2f}"
                for name in ("static_gib", "activations_gib", "allocated_gib", "reserved_gib")
            ),
        )
    console.print(table)
    console.print("GiB of one rank; reserved: what torch's allocator holds", style="dim")
    console.print(verdict(figures))
    if "megatron_gib" in figures:
        other = figures["megatron_gib"]
        console.print(
            f"Megatron's own estimate: {other['total']:.1f} GiB "
            f"({other['weights']:.1f} weights and optimizer, "
            f"{other['activations']:.1f} activations)"
        )
        if (shared := other.get("total_with_sequence_parallel")) is not None:
            console.print(f"by its formula for sequence parallelism: {shared:.1f} GiB")
    notes(console, figures)


def verdict(figures: dict[str, Any]) -> str:
    """Return a sentence on the fullest stage and the limit."""
    peak, limit = figures["peak_reserved_gib"], figures["limit_gib"]
    text = f"fullest: stage {figures['fullest_stage']}, {peak:.1f} GiB reserved"
    if limit is None:
        return f"{text}; no limit: name a GPU with --gpu"
    rest = abs(figures["spare_gib"])
    if figures["fits"]:
        return f"{text} of {limit:.1f} GiB usable: [green]fits[/], {rest:.1f} GiB to spare"
    return f"{text} of {limit:.1f} GiB usable: [red]does not fit[/], {rest:.1f} GiB missing"


def notes(console: Console, figures: dict[str, Any]) -> None:
    """Print what was assumed, and what has no effect here."""
    if figures["assumed"]:
        console.print(f"assumed: {'; '.join(figures['assumed'])}", style="dim")
    if figures["without_effect"]:
        console.print(f"without effect here: {', '.join(figures['without_effect'])}", style="dim")
