"""Draws idea.svg: 1F1B above Seq1F1B, 4 stages, 4 micro-batches, on one time axis."""

from pathlib import Path

from seq1f1b.schedule import Schedule, one_f_one_b
from seq1f1b.simulate import Costs, simulate
from seq1f1b.timeline import Span, Timeline
from seq1f1b.timeline.figure import save_figure


def timeline(schedule: Schedule, name: str) -> Timeline:
    """Simulate with equal costs."""
    run = simulate(schedule, Costs.uniform(schedule))
    stages = zip(schedule.stages, run.starts, run.ends, strict=True)
    return Timeline(name, tuple(tuple(map(Span, *stage)) for stage in stages))


save_figure(
    [
        timeline(one_f_one_b(4, 4), "1F1B"),
        timeline(one_f_one_b(4, 4, 4), "Seq1F1B, 4 sub-sequences"),
    ],
    Path(__file__).with_name("idea.svg"),
)
