"""``seq1f1b plan``: which settings to train a model with on a cluster."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from seq1f1b.cli import megatron, report
from seq1f1b.cli.megatron import or_exit, read_given
from seq1f1b.cli.options import check_output, flag_error
from seq1f1b.cli.timeline import ENDINGS, draw
from seq1f1b.planner.advice import warnings
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.command_line import Given
from seq1f1b.planner.gpu import gpu as load_gpu
from seq1f1b.planner.launch import Launcher, flags, script, wrapped
from seq1f1b.planner.outlook import ways_to_fit
from seq1f1b.planner.problem import Plan, Problem, Row, with_defaults
from seq1f1b.planner.reasons import recompute_word, why_slower
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.search import evaluate, is_tight, search
from seq1f1b.planner.time import ACCURACY
from seq1f1b.timeline import Span, Timeline


def plan(
    ctx: typer.Context,
    gpus: Annotated[
        int, typer.Option("--gpus", min=1, help="Number of GPUs.", rich_help_panel="Cluster")
    ],
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            metavar="NAME|PATH",
            help="Kind of GPU (seq1f1b gpus lists them), this-machine after seq1f1b calibrate, or "
            "the path of a description.",
            rich_help_panel="Cluster",
        ),
    ],
    gpus_per_node: megatron.GpusPerNode = None,
    model: megatron.Model = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Explain the given setting without a search."),
    ] = False,
    schedule: Annotated[
        ScheduleName | None, typer.Option(help="With --explain: which schedule.")
    ] = None,
    script_for: Annotated[
        Launcher | None,
        typer.Option("--script", help="Print only a script that starts the best setting."),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline",
            metavar="FILE",
            help="Draw the best setting's step: .txt, .svg, .png, .html or .json.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Settings to print.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Search for the fastest setting that fits: parallelism, layers, sub-sequences, recomputation.

    The model is a preset, a Hugging Face config.json or Megatron's options; --seq-length and
    --global-batch-size are needed too. Every option of Megatron's that is given stays as it is; the
    others are searched: tensor, pipeline, context, data and expert parallelism, model chunks and
    their layers, the number of sub-sequences and where they are cut, schedule, and recomputation.
    """
    given = read_given(ctx.args, model)
    device = or_exit(lambda: load_gpu(gpu))
    problem = Problem(given.values, gpus, device, gpus_per_node or device.gpus_per_node)
    if timeline is not None:
        check_output("--timeline", timeline, ENDINGS)
    if schedule is not None and not explain:
        raise flag_error("--schedule", "goes with --explain; a search chooses the schedule")
    found = _explained(problem, schedule) if explain else _searched(problem, given)
    best = found.rows[0] if found.rows else None
    if timeline is not None and best is not None:
        draw([_timeline(best)], timeline, "--timeline")
    if as_json:
        report.write_json(_figures(found, given, rows))
    elif script_for is not None:
        if best is None:
            typer.echo(f"seq1f1b: {_nothing_fits(found)}", err=True)
        else:
            typer.echo(script(problem, best.setting, script_for, _command()), nl=False)
    else:
        _print(found, given, rows, explain=explain)
    if best is None:
        raise typer.Exit(1)


def _command() -> str:
    return shlex.join(["seq1f1b", *sys.argv[1:]])


def _searched(problem: Problem, given: Given) -> Plan:
    values = problem.values
    missing = [
        flag
        for flag, name in (
            ("--seq-length", "seq_length"),
            ("--global-batch-size", "global_batch_size"),
        )
        if values.get(name) is None
    ]
    if missing:
        raise flag_error(missing[0], "needed to plan a training step")
    console = Console(stderr=True)
    with console.status("searching ...") as status:
        return or_exit(lambda: search(problem, lambda text: status.update(f"{text} ...")))


def _explained(problem: Problem, schedule: ScheduleName | None) -> Plan:
    setting = or_exit(
        lambda: resolve(with_defaults(problem), num_gpus=problem.num_gpus, schedule=schedule)
    )
    row = evaluate(problem, setting)
    fits = row.peak_gib <= problem.limit_gib
    return Plan(problem, (row,) if fits else (), () if fits else (row,), 1)


def _timeline(row: Row) -> Timeline:
    simulation = row.step.simulation
    stages = zip(simulation.schedule.stages, simulation.starts, simulation.ends, strict=True)
    return Timeline(
        simulation.schedule.name,
        tuple(
            tuple(
                Span(action, start, end)
                for action, start, end in zip(actions, starts, ends, strict=True)
                if action.kind.is_compute
            )
            for actions, starts, ends in stages
        ),
        seconds=True,
    )


def _figures(found: Plan, given: Given, most: int) -> dict[str, Any]:
    problem = found.problem
    return {
        "gpu": problem.gpu.name,
        "gpus": problem.num_gpus,
        "gpus_per_node": problem.gpus_per_node,
        "limit_gib": problem.limit_gib,
        "settings_looked_at": found.num_settings,
        "settings": [_row_figures(found, row) for row in found.rows[:most]],
        "do_not_fit": [_row_figures(found, row) for row in found.overfull[:most]],
        "would_fit": [] if found.rows else list(ways_to_fit(problem, found.overfull)),
        "without_effect": list(given.ignored),
    }


def _row_figures(found: Plan, row: Row) -> dict[str, Any]:
    setting, step, problem = row.setting, row.step, found.problem
    return {
        "tokens_per_second": step.tokens_per_second,
        "step_seconds": step.seconds,
        "mfu": step.mfu(problem.gpu.bf16_tflops.value),
        "bubble_ratio": step.bubble_ratio,
        "peak_reserved_gib": row.peak_gib,
        "fullest_stage": row.fullest_stage,
        "spare_gib": problem.limit_gib - row.peak_gib,
        "tensor": setting.tensor,
        "context": setting.context,
        "pipeline": setting.num_stages,
        "data": setting.data,
        "experts": setting.experts,
        "chunks": setting.num_chunks,
        "splits": setting.num_splits,
        "lengths": list(setting.lengths),
        "layout": setting.arguments.pipeline_model_parallel_layout,
        "recompute": recompute_word(setting.recompute),
        "schedule": str(setting.schedule_name),
        "micro_batch_size": setting.micro_batch_size,
        "micro_batches": setting.num_micro_batches,
        "stage_seconds": list(step.stage_seconds),
        "reduction_seconds": step.reduction,
        "optimizer_seconds": step.optimizer,
        "warnings": list(warnings(problem, step)),
        "flags": flags(setting),
    }


def _print(found: Plan, given: Given, most: int, *, explain: bool) -> None:
    console = report.console()
    problem = found.problem
    nodes = -(-problem.num_gpus // problem.gpus_per_node)
    console.print(
        f"[bold]{problem.num_gpus} x {problem.gpu.title}[/], {nodes} node(s), "
        f"{problem.limit_gib:.1f} GiB usable each"
        + ("" if explain else f"; {found.num_settings} settings looked at")
    )
    rows = found.rows[:most] or found.overfull[:most]
    console.print(_table(found, rows))
    console.print(
        "VP: model chunks of a stage, * with a layout of their layers; s: sub-sequences of a "
        "micro-batch",
        style="dim",
    )
    if not found.rows:
        console.print(f"[red]{_nothing_fits(found)}[/]")
        for way in ways_to_fit(problem, found.overfull):
            console.print(f"  - {way}")
    best = rows[0]
    for number, row in enumerate(rows[1:], 2):
        console.print(f"{number:>2}  {'\n    '.join(_loses(found, row, best))}", style="dim")
    if explain:
        _explain(console, best)
    for warning in warnings(problem, best.step):
        console.print(f"[yellow]warning:[/] {warning}")
    if best.setting.num_splits > 1:
        lengths = ", ".join(map(str, best.setting.lengths))
        console.print(f"sub-sequences of {lengths} tokens")
    console.print(ACCURACY, style="dim")
    if given.ignored:
        console.print(f"without effect here: {', '.join(given.ignored)}", style="dim")
    console.print("\n" + wrapped(flags(best.setting)), markup=False)


def _loses(found: Plan, row: Row, best: Row) -> list[str]:
    text = why_slower(row, best)
    if is_tight(found.problem, row) and not is_tight(found.problem, best):
        spare = found.problem.limit_gib - row.peak_gib
        faster = best.step.seconds / row.step.seconds - 1
        tight = f"{spare:.1f} GiB to spare are less than the memory model's error"
        return [f"{faster:.1%} faster, but {tight}"] if faster > 0 else [f"{text};", tight]
    return [text]


def _nothing_fits(found: Plan) -> str:
    least = found.overfull[0]
    missing = least.peak_gib - found.problem.limit_gib
    return (
        f"nothing fits: the closest setting reserves {least.peak_gib:.1f} of "
        f"{found.problem.limit_gib:.1f} GiB on stage {least.fullest_stage}: {missing:.1f} GiB are "
        "missing"
    )


def _table(found: Plan, rows: tuple[Row, ...]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1))
    has_experts = any(row.setting.model.experts for row in rows)
    ranks = "TPxCPxPPxDP" + (", EP" if has_experts else "")
    for title in ("#", "tokens/s", "MFU", "bubble", "GiB", ranks, "VP", "s"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("recompute", "order"):
        table.add_column(title, no_wrap=True)
    for number, row in enumerate(rows, 1):
        setting, step = row.setting, row.step
        spread = "x".join(
            map(str, (setting.tensor, setting.context, setting.num_stages, setting.data))
        )
        laid_out = setting.arguments.pipeline_model_parallel_layout is not None
        order = str(setting.schedule_name).removeprefix("seq1f1b-").removesuffix("-interleaved")
        table.add_row(
            str(number),
            f"{step.tokens_per_second:.0f}",
            f"{step.mfu(found.problem.gpu.bf16_tflops.value):.1%}",
            f"{step.bubble_ratio:.1%}",
            f"{row.peak_gib:.1f}",
            f"{spread}, {setting.experts}" if has_experts else spread,
            f"{setting.num_chunks}{'*' if laid_out else ''}",
            str(setting.num_splits),
            "-" if setting.recompute.granularity is None else recompute_word(setting.recompute),
            order.replace("seq1f1b", "1f1b").replace("interleaved", "1f1b"),
        )
    return table


def _explain(console: Console, row: Row) -> None:
    """Print where a step's time goes, and what each stage does."""
    step = row.step
    work = max(step.stage_seconds) * step.setting.num_micro_batches
    console.print(
        f"step {step.seconds:.3f} s: slowest stage computes {work:.3f} s, pipeline "
        f"{step.pipeline:.3f} s, gradient reduction {step.reduction:.3f} s, optimizer "
        f"{step.optimizer:.3f} s"
    )
    table = Table(header_style="bold", box=None, pad_edge=False)
    for title in ("stage", "layers", "ms a micro-batch", "idle"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage, seconds in enumerate(step.stage_seconds):
        idle = step.simulation.idle[stage] / step.simulation.step_time
        layers = sum(len(chunk.layers) for chunk in step.setting.chunks[stage])
        table.add_row(str(stage), str(layers), f"{seconds * 1e3:.1f}", f"{idle:.1%}")
    console.print(table)
