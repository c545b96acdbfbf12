"""Why a run is as much faster than 1F1B as it is: factors from the times of both runs' actions."""

from dataclasses import dataclass

from seq1f1b.schedule import Kind, Schedule, ScheduleError, interleaved
from seq1f1b.simulate import CostError, Costs, simulate
from seq1f1b.simulate.costs import Part
from seq1f1b_tools.sweep.plan import Run
from seq1f1b_tools.sweep.records import Summary


@dataclass(frozen=True)
class Factors:
    """The speedup over 1F1B as a product.

    theory: the schedule's, where all stages and sub-sequences take equally long. ends: stages take
    what they took under 1F1B, since the first has the embedding and the last the output layer.
    splitting: sub-sequences take what they took, which differs, and adds up to more than the whole.
    executor: the step took longer than its actions in the simulator, or 1F1B's did: messages, the
    optimizer, and steps that differ.
    """

    theory: float
    ends: float
    splitting: float
    executor: float


def factors(run: Run, summary: Summary, baseline: Summary, speedup: float) -> Factors | None:
    """Split a measured speedup; None where the runs do not tell all of their actions' times."""
    whole = Costs.of_names(baseline.action_milliseconds)
    parts = Costs.of_names(summary.action_milliseconds)
    ours = interleaved(run.pp, run.num_chunks, run.num_micro_batches, run.num_splits)
    try:
        step = simulate(interleaved(run.pp, 1, run.num_micro_batches, 1), whole).step_time
        dealt = simulate(ours, _dealt(whole, ours)).step_time
        cut = simulate(ours, parts).step_time
    except (CostError, ScheduleError):
        return None
    return Factors(
        theory=run.speedup,
        ends=step / dealt / run.speedup,
        splitting=dealt / cut,
        executor=speedup * cut / step,
    )


def _dealt(whole: Costs, schedule: Schedule) -> Costs:
    """Deal every stage's whole forward and backward evenly to chunks and sub-sequences."""
    share = 1 / (schedule.num_chunks * schedule.num_splits)
    stages: list[dict[Part, float]] = []
    for parts in whole.stages:
        stages.append(
            {
                (kind, chunk, j): parts[kind, 0, 0] * share
                for kind in (Kind.F, Kind.B)
                if (kind, 0, 0) in parts
                for chunk in range(schedule.num_chunks)
                for j in range(schedule.num_splits)
            }
        )
    return Costs(tuple(stages))
