"""From flags to what is to be simulated; every combination that makes no sense has its error."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq1f1b.cli.megatron import or_exit
from seq1f1b.cli.options import flag_error
from seq1f1b.cli.source import EqualCosts, SettingCosts, Source, TraceCosts
from seq1f1b.planner.arguments import options
from seq1f1b.planner.catalogue import ScheduleName, by_shape, make
from seq1f1b.planner.command_line import Given
from seq1f1b.planner.gpu import gpu as load_gpu
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.time import Kernels
from seq1f1b.schedule import Kind, Schedule
from seq1f1b.simulate import CostError, HostLink, Simulation, greedy, memory_over_time, simulate
from seq1f1b.timeline import Span, Timeline

_MOST_ACTIONS = 1_000_000


@dataclass(frozen=True)
class Shape:
    """How many stages, model chunks, micro-batches and sub-sequences there are."""

    stages: int
    chunks: int
    micro_batches: int
    splits: int

    @property
    def num_actions(self) -> int:
        """Forwards and backwards of a step, on all stages."""
        return 2 * self.stages * self.chunks * self.micro_batches * self.splits

    def generate(
        self, source: Source, name: ScheduleName, group: int | None, max_live: int | None
    ) -> Schedule:
        """Make the schedule, with a message that names the flag where it has no such shape."""
        actions = self.stages * self.chunks * self.micro_batches * self.splits
        if actions > _MOST_ACTIONS:
            raise flag_error(
                "--microbatches", f"{actions:,} forwards in a step are more than {_MOST_ACTIONS:,}"
            )
        if name is not ScheduleName.GREEDY:
            self._check(name)
        if group is not None and not name.has_chunks:
            raise flag_error("--group", f"{name} takes no turns; only interleaved schedules do")
        if max_live is not None and name is not ScheduleName.GREEDY:
            raise flag_error("--max-live", f"{name} holds what it holds; only greedy takes a cap")
        if self.chunks > 1 and self.stages == 1:
            raise flag_error("--stages", f"{name} needs at least 2 stages")
        if name is ScheduleName.GREEDY:
            return self._greedy(source, max_live)
        try:
            return make(name, self.stages, self.chunks, self.micro_batches, self.splits, group)
        except ValueError as error:
            raise flag_error("--group", str(error)) from None

    def _check(self, name: ScheduleName) -> None:
        if not name.has_chunks and self.chunks > 1:
            raise flag_error("--chunks", f"{name} has 1 model chunk a stage, not {self.chunks}")
        if name.has_chunks and self.chunks == 1:
            raise flag_error("--chunks", f"{name} needs at least 2 model chunks a stage")
        if name is not ScheduleName.GPIPE and not name.has_splits and self.splits > 1:
            raise flag_error("--splits", f"{name} has 1 sub-sequence, not {self.splits}")
        if name.has_splits and self.splits == 1:
            raise flag_error("--splits", f"{name} needs at least 2 sub-sequences")

    def _greedy(self, source: Source, max_live: int | None) -> Schedule:
        sizes = self.stages, self.chunks, self.micro_batches, self.splits
        like = make(by_shape(self.chunks, self.splits), *sizes)
        costs, link = source.costs(like), source.link(like)
        try:
            return greedy(*sizes, costs, link, max_live=max_live)
        except CostError as error:
            raise flag_error("--trace", str(error)) from None
        except ValueError as error:
            raise flag_error("--max-live", str(error)) from None


_SHAPE = (
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "seq1f1b_splits",
    "seq1f1b_max_live",
    "seq1f1b_schedule",
)
CHUNKS = (
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
)
"""Fields that say how many model chunks a stage has."""
ASSUMED_GPU = "a100-80g"


@dataclass(frozen=True)
class Device:
    """Where a model runs: a GPU by name, or a stage that reaches ``tflops``, and links."""

    gpu: str | None
    num_gpus: int | None
    gpus_per_node: int | None
    tflops: float | None
    backward_ratio: float
    latency: float | None
    bandwidth: float | None

    @property
    def gpu_name(self) -> str | None:
        """The GPU that is named, or assumed where no rate is given."""
        return self.gpu or (None if self.tflops else ASSUMED_GPU)

    def kernels(self) -> Kernels | None:
        """Return the GPU's curves; None where a stage's rate is given."""
        if self.gpu is not None and self.tflops is not None:
            raise flag_error("--tflops", "a GPU has its own rates; leave out --tflops or --gpu")
        name = self.gpu_name
        if name is None:
            return None
        return Kernels(or_exit(lambda: load_gpu(name)), self.gpus_per_node)


def make_source(
    given: Given, micro_batches: int | None, trace: Path | None, device: Device
) -> Source:
    """Choose where costs come from: a trace, a model, or equal actions."""
    model = [name for name in given.values if name not in _SHAPE]
    flags = {option.name: option.flags[0] for option in options()}
    if trace is not None:
        if model:
            flag = flags[model[0]]
            raise flag_error(flag, "a trace has its own costs; leave out the model or --trace")
        if device.bandwidth is not None:
            raise flag_error("--bandwidth", "the size of a trace's tensors is not known")
        _refuse_device(device, "a trace has its own costs")
        return TraceCosts.read(trace, device.latency or 0.0)
    if not model:
        if device.bandwidth is not None:
            raise flag_error("--bandwidth", "needs a model: --model, or Megatron's options")
        _refuse_device(device, "needs a model: --model, or Megatron's options")
        return EqualCosts(device.backward_ratio, device.latency or 0.0)
    values = dict(given.values)
    kernels = device.kernels()
    if kernels is not None and kernels.gpu.runtime == "cpu":
        values = {"bf16": False} | values
    if micro_batches is not None:
        rows = (values.get("micro_batch_size") or 1) * _data_parallel(values, device.num_gpus)
        values["global_batch_size"] = micro_batches * rows
    # refuses what is wrong with the model before any schedule is made
    one = values | {"seq1f1b_splits": None, "num_virtual_stages_per_pipeline_rank": None}
    or_exit(lambda: resolve(one, num_gpus=device.num_gpus))
    return SettingCosts(
        values,
        device.num_gpus,
        kernels,
        device.tflops or 0.0,
        device.backward_ratio,
        device.latency,
        device.bandwidth,
    )


def _refuse_device(device: Device, why: str) -> None:
    for flag, value in (("--gpu", device.gpu), ("--gpus", device.num_gpus)):
        if value is not None:
            raise flag_error(flag, why)


def _data_parallel(values: Mapping[str, Any], num_gpus: int | None) -> int:
    ranks = 1
    for name in (
        "tensor_model_parallel_size",
        "context_parallel_size",
        "pipeline_model_parallel_size",
    ):
        ranks *= values.get(name) or 1
    return max(1, (num_gpus or ranks) // ranks)


def make_shape(
    source: Source, given: Given, micro_batches: int | None, splits: int | None = None
) -> Shape:
    """Take what is given, from the trace what is not, and 1 for chunks and splits without one."""
    values = given.values
    stages = values.get("pipeline_model_parallel_size")
    chunks = values.get("num_virtual_stages_per_pipeline_rank")
    splits = splits or values.get("seq1f1b_splits")
    for flag, number in (("--stages", stages), ("--chunks", chunks), ("--splits", splits)):
        if number is not None and number < 1:
            raise flag_error(flag, f"{number}: must be at least 1")
    own = source.schedule if isinstance(source, TraceCosts) else None
    if own is not None:
        if stages not in (None, own.num_stages):
            raise flag_error("--stages", f"{stages}, but the trace has {own.num_stages}")
        return Shape(
            own.num_stages,
            chunks or own.num_chunks,
            micro_batches or own.num_micro_batches,
            splits or own.num_splits,
        )
    if stages is None:
        raise flag_error("--stages", "how many pipeline stages? Give it, or a --trace")
    if isinstance(source, SettingCosts):
        fixed, num_gpus = source.values, source.num_gpus
        whole = or_exit(lambda: resolve({**fixed, "seq1f1b_splits": None}, num_gpus=num_gpus))
        if micro_batches is None and fixed.get("global_batch_size") is None:
            raise flag_error("--microbatches", "how many micro-batches? Or --global-batch-size")
        return Shape(stages, whole.num_chunks, whole.num_micro_batches, splits or 1)
    if micro_batches is None:
        raise flag_error("--microbatches", "how many micro-batches? Give it, or a --trace")
    return Shape(stages, chunks or 1, micro_batches, splits or 1)


def make_schedule(
    source: Source,
    shape: Shape,
    name: ScheduleName | None,
    group: int | None,
    max_live: int | None,
) -> Schedule:
    """Generate what is named, or what the shape asks for; from a trace its own order of actions."""
    if isinstance(source, TraceCosts) and not (name or group or max_live):
        own = source.schedule
        if shape == Shape(own.num_stages, own.num_chunks, own.num_micro_batches, own.num_splits):
            return own
    return shape.generate(source, name or by_shape(shape.chunks, shape.splits), group, max_live)


def run(source: Source, schedule: Schedule, host_link: HostLink | None = None) -> Simulation:
    """Simulate, with the costs of ``source``; ``host_link``: what brings chunks that visit."""
    try:
        return simulate(schedule, source.costs(schedule), source.link(schedule), host_link)
    except CostError as error:
        raise flag_error("--trace", str(error)) from None


def as_timeline(source: Source, result: Simulation) -> Timeline:
    """Return what the pictures draw of a simulation."""
    stages = [
        [Span(*entry) for entry in zip(*columns, strict=True)]
        for columns in zip(result.schedule.stages, result.starts, result.ends, strict=True)
    ]
    copies = tuple(
        (
            tuple(span for span in spans if span.action.kind.is_load),
            tuple(span for span in spans if span.action.kind is Kind.FREE_B),
        )
        for spans in stages
    )
    return Timeline(
        result.schedule.name,
        tuple(tuple(span for span in spans if span.action.kind.is_compute) for spans in stages),
        copies=copies if result.schedule.slots is not None else (),
        seconds=source.seconds,
        memory=memory_over_time(result, source.memory(result.schedule)),
        memory_unit=source.memory_unit,
    )
