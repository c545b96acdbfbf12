"""The memory of all stages under a setting."""

from dataclasses import dataclass
from functools import cached_property

from seq1f1b.planner.memory.allocator import GIB
from seq1f1b.planner.memory.closed_form import estimate_stages
from seq1f1b.planner.memory.stage import StageMemory, trace_stage
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.schedule import Schedule

_NEARLY = 0.95
_ENOUGH_LAYERS = 12_000
"""Layers, forward and backward, that are followed in a few seconds."""


@dataclass(frozen=True)
class MemoryTrace:
    """Peaks of every stage."""

    stages: tuple[StageMemory, ...]

    @cached_property
    def fullest(self) -> int:
        """The stage that reserves most."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].reserved)

    @property
    def peak_gib(self) -> float:
        """What the fullest stage reserves."""
        return self.stages[self.fullest].reserved / GIB

    @property
    def mean_gib(self) -> float:
        """What the stages reserve on average."""
        return sum(stage.reserved for stage in self.stages) / len(self.stages) / GIB


def trace_memory(
    setting: Setting, runtime: Runtime, schedule: Schedule | None = None
) -> MemoryTrace:
    """Follow all tensors of a step on every stage; ``schedule`` is the setting's own unless given.

    Of a very long step only some micro-batches are followed, at least three turns of them.
    """
    if schedule is None:
        schedule = _shortened(setting).schedule()
    return MemoryTrace(
        tuple(
            trace_stage(setting, runtime, stage, actions)
            for stage, actions in enumerate(schedule.stages)
        )
    )


def trace_fullest(
    setting: Setting, runtime: Runtime, schedule: Schedule | None = None
) -> tuple[int, StageMemory]:
    """Return the fullest stage and its peaks, from one short step.

    Only the stage that the closed form finds fullest is followed, and the next one if it comes
    near; through three turns.
    """
    if schedule is None:
        schedule = _shortened(setting, enough=0).schedule()
    estimates = estimate_stages(setting, runtime)
    first, *others = sorted(range(len(estimates)), key=lambda stage: -estimates[stage])
    fullest = [first, *(one for one in others[:1] if estimates[one] > _NEARLY * estimates[first])]
    traced = [
        (stage, trace_stage(setting, runtime, stage, schedule.stages[stage], num_steps=1))
        for stage in fullest
    ]
    return max(traced, key=lambda one: one[1].reserved)


def _shortened(setting: Setting, enough: int = _ENOUGH_LAYERS) -> Setting:
    """Return the setting with fewer micro-batches where a whole step would take too long.

    A turn is as many micro-batches as have a sub-sequence for every stage: from the second on, what
    a stage holds repeats itself, and only fragmentation still grows a little.
    """
    turn = -(-setting.num_stages // setting.num_splits)
    layers = setting.model.num_layers * setting.num_splits
    most = max(3 * turn + 2, enough // layers)
    most -= (most - setting.num_micro_batches) % turn
    if setting.schedule_name == "gpipe" or setting.num_micro_batches <= most:
        return setting
    return setting.with_micro_batches(most)
