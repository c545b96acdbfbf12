"""Timelines for the tests to draw."""

from seq1f1b.schedule import Schedule
from seq1f1b.simulate import Costs, Memory, memory_over_time, simulate
from seq1f1b.timeline import Span, Timeline


def planned(schedule: Schedule, *, seconds: bool = False) -> Timeline:
    """Simulate with equal costs: a forward of a stage and micro-batch takes 1, a backward 2."""
    result = simulate(schedule, Costs.uniform(schedule))
    return Timeline(
        schedule.name,
        tuple(
            tuple(Span(*entry) for entry in zip(*columns, strict=True))
            for columns in zip(schedule.stages, result.starts, result.ends, strict=True)
        ),
        seconds=seconds,
        memory=memory_over_time(result, Memory.in_micro_batches(schedule)),
    )
