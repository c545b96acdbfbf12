"""A whole training step: the pipeline, the reduction of gradients, and the optimizer."""

from dataclasses import dataclass
from functools import cached_property

from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.memory.parameters import gradient_bytes, stage_parameters
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time.actions import action_costs, stage_link
from seq1f1b.planner.time.kernels import Kernels
from seq1f1b.schedule import Kind, Schedule
from seq1f1b.simulate import Costs, Link, Simulation, greedy, simulate
from seq1f1b.simulate.formulas import bubble_ratio

_OPTIMIZER_BYTES = 28
"""What Adam reads and writes of a parameter: gradient, main parameter, two moments; parameter."""
_LONG = 30_000
"""Actions of a step that is not simulated as a whole."""
_LAST_BUCKET = 0.1
"""Share of an overlapped reduction that nothing is left to hide."""


@dataclass(frozen=True)
class StepTime:
    """A step of a setting, in seconds.

    pipeline: from the first forward to the last backward.
    """

    setting: Setting
    costs: Costs
    link: Link
    pipeline: float
    reduction: float
    optimizer: float

    @cached_property
    def simulation(self) -> Simulation:
        """The pipeline, action by action."""
        return simulate(make_schedule(self.setting, self.costs, self.link), self.costs, self.link)

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.pipeline + self.reduction + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        s = self.setting
        batch = s.micro_batch_size * s.num_micro_batches * s.data
        return batch * s.seq_length / self.seconds

    @property
    def bubble_ratio(self) -> float:
        """Idle time over total time in the pipeline."""
        work = sum(self.stage_seconds) / len(self.stage_seconds)
        return 1.0 - work * self.setting.num_micro_batches / self.pipeline

    def mfu(self, tflops: float) -> float:
        """Return the share of ``tflops`` a device that the model's operations take.

        A token's forward and backward, with causal attention's half, nothing computed anew.
        """
        s = self.setting
        cost = s.model.token_cost(s.vocabulary)
        per_sequence = 3.0 * cost.of_first(s.seq_length)
        rate = per_sequence * self.tokens_per_second / s.seq_length
        return rate / (tflops * 1e12 * s.num_gpus)

    @cached_property
    def stage_seconds(self) -> tuple[float, ...]:
        """What each stage computes of one micro-batch."""
        return tuple(
            sum(parts[part] for part in parts if part[0] in (Kind.F, Kind.B))
            for parts in self.costs.stages
        )


def make_schedule(setting: Setting, costs: Costs, link: Link) -> Schedule:
    """Return the setting's schedule; a greedy one is searched with these costs."""
    if setting.schedule_name is not ScheduleName.GREEDY:
        return setting.schedule()
    return greedy(
        setting.num_stages,
        setting.num_chunks,
        setting.num_micro_batches,
        setting.num_splits,
        costs,
        link,
        max_live=setting.arguments.seq1f1b_max_live,
    )


def step_time(setting: Setting, kernels: Kernels, runtime: Runtime) -> StepTime:
    """Simulate a step; of a very long one the first and last micro-batches."""
    costs, link = action_costs(setting, kernels, runtime), stage_link(setting, kernels)
    return StepTime(
        setting,
        costs,
        link,
        _pipeline_seconds(setting, costs, link),
        gradient_reduction(setting, kernels, costs),
        optimizer_seconds(setting, kernels),
    )


def num_actions(setting: Setting) -> int:
    """Return the forwards and backwards of a step, on all stages."""
    parts = setting.num_stages * setting.num_chunks * setting.num_splits
    return 2 * parts * setting.num_micro_batches


def _pipeline_seconds(setting: Setting, costs: Costs, link: Link) -> float:
    """Simulate, or take the steady phase of a long step for as long as one turn of it.

    A turn is as many micro-batches as have a sub-sequence for every stage.
    """
    turn = -(-setting.num_stages // setting.num_splits)
    fewer = 3 * turn + setting.num_micro_batches % turn
    is_long = num_actions(setting) > _LONG and setting.num_micro_batches > fewer + turn
    if not is_long or setting.schedule_name is ScheduleName.GREEDY:
        return simulate(make_schedule(setting, costs, link), costs, link).step_time
    short, longer = (
        simulate(setting.with_micro_batches(number).schedule(), costs, link).step_time
        for number in (fewer, fewer + turn)
    )
    turns = (setting.num_micro_batches - fewer) / turn
    return short + turns * (longer - short)


def quick_seconds(setting: Setting, kernels: Kernels, runtime: Runtime) -> float:
    """Return a step's time in closed form: the slowest stage's work and the schedule's bubble."""
    costs = action_costs(setting, kernels, runtime)
    work = max(
        sum(seconds for (kind, _, _), seconds in parts.items() if kind in (Kind.F, Kind.B))
        for parts in costs.stages
    )
    sizes = setting.num_stages, setting.num_chunks, setting.num_micro_batches, setting.num_splits
    ratio = bubble_ratio(*sizes)
    if setting.schedule_name.is_zero_bubble:
        ratio /= 3
    pipeline = work * setting.num_micro_batches / (1 - ratio)
    return (
        pipeline + gradient_reduction(setting, kernels, costs) + optimizer_seconds(setting, kernels)
    )


def gradient_reduction(setting: Setting, kernels: Kernels, costs: Costs) -> float:
    """Return the time that data parallelism adds to a step, on the slowest stage.

    With overlap, gradients are reduced beside the last micro-batch's backward, and parameters are
    gathered beside the first one's forward; what does not fit there is left.
    """
    a = setting.arguments
    ranks, stride = setting.data * setting.context, setting.tensor
    worst = 0.0
    for stage in _different_stages(setting):
        held = stage_parameters(setting, stage)
        expert_stride = setting.expert_tensor * setting.experts
        gradients, gathered = 0.0, 0.0
        for number, count, apart in (
            (held.dense, ranks, stride),
            (held.experts, setting.expert_data, expert_stride),
        ):
            size = number * gradient_bytes(setting)
            if a.use_distributed_optimizer:
                gradients += kernels.collective("reduce_scatter", size, count, apart)
                size = number * setting.element_bytes
                gathered += kernels.collective("all_gather", size, count, apart)
            else:
                gradients += kernels.collective("all_reduce", size, count, apart)
        parts = costs.stages[stage]
        if a.overlap_grad_reduce:
            beside = sum(parts[part] for part in parts if part[0] is Kind.B)
            gradients = max(_LAST_BUCKET * gradients, gradients - beside)
        if a.overlap_param_gather:
            beside = sum(parts[part] for part in parts if part[0] is Kind.F)
            gathered = max(_LAST_BUCKET * gathered, gathered - beside)
        worst = max(worst, gradients + gathered)
    return worst


def _different_stages(setting: Setting) -> list[int]:
    """Return one stage of each kind, by its layers."""
    first = {chunks: stage for stage, chunks in reversed(list(enumerate(setting.chunks)))}
    return list(first.values())


def optimizer_seconds(setting: Setting, kernels: Kernels) -> float:
    """Return the time of the optimizer's step on the fullest stage."""
    sharded = setting.arguments.use_distributed_optimizer
    worst = 0.0
    for stage in _different_stages(setting):
        held = stage_parameters(setting, stage)
        states = held.dense / (setting.data * setting.context if sharded else 1)
        states += held.experts / (setting.expert_data if sharded else 1)
        worst = max(worst, kernels.elementwise(_OPTIMIZER_BYTES * states))
    return worst
