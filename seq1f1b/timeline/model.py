"""What is drawn: every stage's computations with their start and end."""

from dataclasses import dataclass
from functools import cached_property

from seq1f1b.schedule import Action, Span

Curve = tuple[tuple[float, float], ...]
"""Moments, each with the value that holds from then on."""


Lanes = tuple[tuple[Span, ...], tuple[Span, ...]]
"""Copies of a stage, into the device and out of it, each in the order of their start."""
LANES = ("in", "out")
"""What the two are called."""


@dataclass(frozen=True)
class Timeline:
    """One run of a schedule, planned or measured.

    stages: each stage's computations in the order of their start. seconds: whether times are in
    seconds or, for a plan with no cost model, in units of one stage's forward of a micro-batch.
    memory: for each stage how much it holds, or nothing; memory_unit: in what. copies: where model
    chunks visit the device, for each stage what is copied there, and gradients copied from it.
    """

    name: str
    stages: tuple[tuple[Span, ...], ...]
    seconds: bool = False
    memory: tuple[Curve, ...] = ()
    memory_unit: str = "micro-batches"
    copies: tuple[Lanes, ...] = ()

    @cached_property
    def length(self) -> float:
        """From 0 to the end of the last computation or copy."""
        rows = [*self.stages, *(lane for lanes in self.copies for lane in lanes)]
        return max((span.end for spans in rows for span in spans), default=0.0)

    @cached_property
    def num_chunks(self) -> int:
        """How many model chunks a stage has."""
        return 1 + max((span.action.chunk for spans in self.stages for span in spans), default=0)

    @cached_property
    def num_splits(self) -> int:
        """How many sub-sequences a micro-batch has."""
        return 1 + max(
            (span.action.sub_sequence for spans in self.stages for span in spans), default=0
        )

    @cached_property
    def num_micro_batches(self) -> int:
        """How many micro-batches a step has."""
        return 1 + max(
            (span.action.micro_batch for spans in self.stages for span in spans), default=0
        )

    def busy(self, stage: int) -> float:
        """How long a stage computes."""
        return sum(span.end - span.start for span in self.stages[stage])

    def idle_ratio(self, stage: int) -> float:
        """Which share of the whole length a stage does not compute."""
        return 1.0 - self.busy(stage) / self.length if self.length else 0.0

    @property
    def bubble_ratio(self) -> float:
        """Idle time over total time, of all stages together."""
        stages = range(len(self.stages))
        return sum(self.idle_ratio(stage) for stage in stages) / max(len(stages), 1)

    def copying_ratio(self, stage: int, lane: int) -> float:
        """Return for which share of the whole length a lane of a stage copies."""
        copied = sum(span.end - span.start for span in self.copies[stage][lane])
        return copied / self.length if self.length else 0.0

    def gaps(self, stage: int) -> list[tuple[float, float]]:
        """Return when a stage is idle: start and end of each wait, none of them empty."""
        gaps, free = [], 0.0
        rounding = 1e-9 * self.length
        for span in self.stages[stage]:
            if span.start > free + rounding:
                gaps.append((free, span.start))
            free = max(free, span.end)
        if self.length > free + rounding:
            gaps.append((free, self.length))
        return gaps

    def label(self, action: Action) -> str:
        """Return what tells the action from others of its kind and chunk, as short as can be.

        Of a copy it is the chunk.
        """
        if not action.kind.is_compute:
            return str(action.chunk)
        if self.num_splits == 1:
            return str(action.micro_batch)
        return f"{action.micro_batch}.{action.sub_sequence}"

    def time(self, value: float) -> str:
        """Write a time with its unit."""
        if not self.seconds:
            return f"{value:.4g}"
        for factor, unit in ((1.0, "s"), (1e3, "ms")):
            if abs(value) * factor >= 1.0:
                return f"{value * factor:.4g} {unit}"
        return f"{value * 1e6:.4g} µs"
