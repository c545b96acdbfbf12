"""Where a command takes costs from: equal actions, a model's arithmetic, or a trace."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from seq1f1b.cli.options import flag_error
from seq1f1b.offload.planning.memory import slot_sizes
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.chunks import chunk_memory, chunk_operations
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import Runtime, runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time import Kernels, action_costs, stage_link
from seq1f1b.schedule import Schedule, ScheduleError, validate
from seq1f1b.simulate import Costs, Link, Memory
from seq1f1b.simulate.memory import ByChunk
from seq1f1b.timeline import Timeline, TraceError, read_trace


class Source(Protocol):
    """Costs of any schedule that it knows enough for."""

    @property
    def seconds(self) -> bool:
        """Whether its times are in seconds."""
        ...

    @property
    def memory_unit(self) -> str:
        """What its memory counts in."""
        ...

    def costs(self, schedule: Schedule) -> Costs:
        """Return the time of each action."""
        ...

    def link(self, schedule: Schedule) -> Link:
        """Return what transfers cost."""
        ...

    def memory(self, schedule: Schedule) -> Memory | ByChunk:
        """Return what a sub-sequence holds."""
        ...


@dataclass(frozen=True)
class EqualCosts:
    """All stages and sub-sequences alike; the forward of a stage on a micro-batch takes 1."""

    backward_ratio: float = 2.0
    latency: float = 0.0
    seconds: bool = False
    memory_unit: str = "micro-batches"

    def costs(self, schedule: Schedule) -> Costs:
        """See Source."""
        return Costs.uniform(schedule, backward=self.backward_ratio)

    def link(self, schedule: Schedule) -> Link:
        """See Source."""
        return Link(latency=self.latency)

    def memory(self, schedule: Schedule) -> Memory:
        """See Source."""
        return Memory.in_micro_batches(schedule)


@dataclass(frozen=True)
class SettingCosts:
    """A model spread over stages as Megatron's options say: each chunk's own time and memory.

    values: fields of ``Arguments``. kernels: a GPU's curves; None where a stage reaches ``tflops``
    whatever it computes. latency, bandwidth: instead of the GPU's.
    """

    values: Mapping[str, Any]
    num_gpus: int | None
    kernels: Kernels | None
    tflops: float
    backward_ratio: float
    latency: float | None
    bandwidth: float | None
    seconds: bool = True
    memory_unit: str = "bytes"

    @property
    def profile(self) -> Runtime:
        """The runtime whose tensors are kept."""
        return runtime(self.kernels.gpu.runtime if self.kernels else "current")

    def setting(self, schedule: Schedule) -> Setting:
        """Return the setting with the schedule's shape; raises SettingError, as Megatron does."""
        values = dict(self.values)
        values["seq1f1b_splits"] = schedule.num_splits
        laid_out = values.get("pipeline_model_parallel_layout") is not None
        if not laid_out and values.get("num_layers_per_virtual_pipeline_stage") is None:
            chunks = schedule.num_chunks
            values["num_virtual_stages_per_pipeline_rank"] = chunks if chunks > 1 else None
        name = ScheduleName(schedule.name) if schedule.name in ScheduleName else None
        return resolve(values, num_gpus=self.num_gpus, schedule=name)

    def costs(self, schedule: Schedule) -> Costs:
        """See Source."""
        setting = self.setting(schedule)
        if self.kernels is not None:
            return action_costs(setting, self.kernels, self.profile)
        return Costs.of_chunks(
            chunk_operations(setting),
            setting.lengths,
            flops_per_second=self.tflops * 1e12 / setting.micro_batch_size,
            backward_ratio=self.backward_ratio,
        )

    def link(self, schedule: Schedule) -> Link:
        """See Source: tensors are [n, b, hidden], shared out by tensor and context parallelism."""
        setting = self.setting(schedule)
        token = setting.model.hidden * setting.element_bytes
        token //= setting.tensor if setting.sequence_parallel else 1
        own = stage_link(setting, self.kernels) if self.kernels is not None else Link()
        return Link(
            latency=own.latency if self.latency is None else self.latency,
            bandwidth=own.bandwidth if self.bandwidth is None else self.bandwidth * 1e9,
            tensor_bytes=tuple(
                float(setting.tokens(part) * token) for part in range(setting.num_splits)
            ),
        )

    def memory(self, schedule: Schedule) -> ByChunk:
        """See Source; where chunks visit the device, its slots for them count."""
        setting = self.setting(schedule)
        kept = chunk_memory(setting, self.profile)
        if schedule.slots is None:
            return kept
        stages = []
        for stage, chunks in enumerate(kept):
            weights, gradients = slot_sizes(setting, stage, num_slots=1)
            stages.append(
                tuple(replace(chunk, weights=weights, gradients=gradients) for chunk in chunks)
            )
        return tuple(stages)


@dataclass(frozen=True)
class TraceCosts:
    """What one step measured; ``timeline`` is that step and ``schedule`` its order of actions."""

    path: Path
    timeline: Timeline
    schedule: Schedule
    latency: float = 0.0
    seconds: bool = True
    memory_unit: str = "micro-batches"

    @classmethod
    def read(cls, path: Path, latency: float) -> "TraceCosts":
        """Read a trace that holds every action of a step."""
        try:
            timeline = read_trace(path)
            schedule = Schedule(
                "replayed",
                len(timeline.stages),
                timeline.num_chunks,
                timeline.num_micro_batches,
                timeline.num_splits,
                tuple(tuple(span.action for span in spans) for spans in timeline.stages),
            )
            validate(schedule)
        except TraceError as error:
            raise flag_error("--trace", str(error)) from None
        except ScheduleError as error:
            raise flag_error("--trace", f"{path}: not one whole step: {error}") from None
        return cls(path, timeline, schedule, latency)

    def costs(self, schedule: Schedule) -> Costs:
        """See Source: for the trace's own chunks and sub-sequences, or for all of them as one."""
        own = self.schedule
        if schedule.num_stages != own.num_stages:
            raise flag_error("--stages", f"{self.path} has {own.num_stages}")
        if schedule.num_chunks not in (1, own.num_chunks):
            raise flag_error("--chunks", f"{self.path} has {own.num_chunks}")
        if schedule.num_splits not in (1, own.num_splits):
            raise flag_error("--splits", f"{self.path} has {own.num_splits}")
        measured = Costs.measured(self.timeline.stages).completed()
        return measured.merged(schedule.num_chunks, schedule.num_splits)

    def link(self, schedule: Schedule) -> Link:
        """See Source."""
        return Link(latency=self.latency)

    def memory(self, schedule: Schedule) -> Memory:
        """See Source."""
        return Memory.in_micro_batches(schedule)
