"""Figures of a simulation, as JSON and as text."""

import json
from typing import Any

from rich.console import Console

from seq1f1b.cli.source import SettingCosts, Source
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.command_line import Given
from seq1f1b.planner.resolve import resolve
from seq1f1b.schedule import Kind, Schedule
from seq1f1b.simulate import Simulation, formulas, peak_memory


def figures(source: Source, result: Simulation) -> dict[str, Any]:
    """Return what is worth knowing of a simulation, in plain numbers."""
    schedule = result.schedule
    visits: dict[str, Any] = {}
    if schedule.slots is not None:
        loads = [sum(a.kind.is_load for a in actions) for actions in schedule.stages]
        copying = [list(times) for times in result.copying]
        visits = {"slots": schedule.num_slots, "chunk_loads": loads, "copying": copying}
    return {
        "schedule": schedule.name,
        "stages": schedule.num_stages,
        "chunks": schedule.num_chunks,
        "microbatches": schedule.num_micro_batches,
        "splits": schedule.num_splits,
        "step_time": result.step_time,
        "time_unit": "s" if source.seconds else "forward of a stage on one micro-batch",
        "bubble_ratio": result.bubble_ratio,
        "bubble_ratio_in_theory": _in_theory(source, schedule),
        "idle": list(result.idle),
        "peak_live": list(result.peak_live),
        "peak_memory": list(peak_memory(result, source.memory(schedule))),
        "memory_unit": source.memory_unit,
        **visits,
    }


def _in_theory(source: Source, schedule: Schedule) -> float | None:
    """Return the formula's bubble ratio for equal actions; None if the schedule has no formula."""
    sizes = schedule.num_micro_batches, schedule.num_splits
    if schedule.name == ScheduleName.GREEDY or schedule.slots is not None:
        return None
    if schedule.name in (ScheduleName.ZERO_BUBBLE, ScheduleName.SEQ_ZERO_BUBBLE):
        if not formulas.zb_h1_applies(schedule.num_stages, *sizes):
            return None
        costs = source.costs(schedule)
        return formulas.zb_h1_bubble_ratio(
            schedule.num_stages,
            *sizes,
            forward=costs.total(Kind.F),
            input_gradient=costs.total(Kind.I),
            weight_gradient=costs.total(Kind.W),
        )
    return formulas.bubble_ratio(schedule.num_stages, schedule.num_chunks, *sizes)


def notes(source: Source, given: Given) -> dict[str, Any]:
    """Return what was assumed of a model, and which options have no effect here."""
    if not isinstance(source, SettingCosts):
        return {}
    assumed = resolve(source.values, num_gpus=source.num_gpus).assumed
    return {"assumed": list(assumed), "without_effect": list(given.ignored)}


def print_notes(source: Source, given: Given, *, visits: bool = False) -> None:
    """Print what memory leaves out, what was assumed, and which options have no effect here.

    visits: whether model chunks visit the device, whose slots then count as memory.
    """
    out = console()
    if isinstance(source, SettingCosts):
        rates = f"{source.tflops:g} TFLOP/s a stage, for short sub-sequences as for long ones"
        if source.kernels is not None:
            rates = f"kernel curves of {source.kernels.gpu.title}"
        out.print(f"times: {rates}", style="dim")
        memory = "memory leaves out weights, optimizer and temporaries: seq1f1b memory has them"
        if visits:
            memory = "memory has the slots for weights and gradients; it leaves out temporaries"
        out.print(memory, style="dim")
        assumed = resolve(source.values, num_gpus=source.num_gpus).assumed
        if assumed:
            out.print(f"assumed: {'; '.join(assumed)}", style="dim")
        if given.ignored:
            out.print(f"without effect here: {', '.join(given.ignored)}", style="dim")
    elif not source.seconds:
        out.print(
            "all actions alike: short sub-sequences look better than they are; name a --model and "
            "a --gpu",
            style="dim",
        )


def console() -> Console:
    """Return a console that never cuts a table: in a pipe it is as wide as any."""
    out = Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, soft_wrap=True, width=240)


def write_json(value: Any) -> None:
    """Print JSON on standard output."""
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(
        json.dumps(value, indent=2, allow_nan=False)
    )


def time_text(source: Source, value: float) -> str:
    """Write a time with its unit, if it has one."""
    if not source.seconds:
        return f"{value:.2f}"
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def memory_text(source: Source, value: float) -> str:
    """Write an amount of memory, without the unit if that is micro-batches."""
    return f"{value / 2**30:.2f}" if source.memory_unit == "bytes" else f"{value:.2f}"


def memory_title(source: Source) -> str:
    """Return the heading of a column of ``memory_text``."""
    return "GiB" if source.memory_unit == "bytes" else source.memory_unit
