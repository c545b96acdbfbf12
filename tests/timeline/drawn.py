"""Timelines for the tests to draw."""

from seq1f1b.cli.problem import as_timeline
from seq1f1b.cli.source import EqualCosts
from seq1f1b.schedule import Schedule, interleaved, lower, visiting
from seq1f1b.simulate import Costs, HostLink, Memory, memory_over_time, simulate
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


def with_copies() -> Timeline:
    """Plan 2 stages of 2 chunks in one slot, 2 micro-batches; every copy takes 0.75."""
    schedule = visiting(lower(interleaved(2, 2, 2)), 1, prefetch=True)
    source = EqualCosts()
    host_link = HostLink.uniform(schedule, weights=0.75, gradients=0.75, bandwidth=1.0)
    return as_timeline(source, simulate(schedule, source.costs(schedule), host_link=host_link))
