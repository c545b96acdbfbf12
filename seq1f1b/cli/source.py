"""Where a command takes costs from: equal actions, a model's arithmetic, or a trace."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from seq1f1b.cli.options import BalanceName, flag_error
from seq1f1b.schedule import Schedule, ScheduleError, validate
from seq1f1b.sequence import PartitionError, TokenCost, partition
from seq1f1b.simulate import Costs, Link, Memory
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

    def memory(self, schedule: Schedule) -> Memory:
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
class ModelCosts:
    """A GPT's matrix products, at so many TFLOP/s a stage."""

    seq_length: int
    hidden_size: int
    layers: int
    heads: int
    query_groups: int | None
    ffn_hidden_size: int | None
    micro_batch_size: int
    balance_method: BalanceName
    multiple: int
    backward_ratio: float
    tflops: float
    latency: float
    bandwidth: float | None
    seconds: bool = True
    memory_unit: str = "bytes"

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise flag_error("--heads", f"{self.hidden_size} is not a multiple of {self.heads}")
        if self.query_groups and self.heads % self.query_groups:
            raise flag_error(
                "--query-groups", f"{self.heads} heads cannot share {self.query_groups} groups"
            )

    @property
    def _cost(self) -> TokenCost:
        return TokenCost.of_transformer(
            num_layers=self.layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            num_query_groups=self.query_groups,
            ffn_hidden_size=self.ffn_hidden_size,
        )

    def lengths(self, num_splits: int) -> tuple[int, ...]:
        """Cut the sequence."""
        try:
            return partition(
                self.seq_length,
                num_splits,
                method=self.balance_method.value,
                cost=self._cost,
                multiple=self.multiple,
            )
        except PartitionError as error:
            raise flag_error("--seq-length", str(error)) from None

    def costs(self, schedule: Schedule) -> Costs:
        """See Source."""
        return Costs.of_tokens(
            schedule,
            self._cost,
            self.lengths(schedule.num_splits),
            flops_per_second=self.tflops * 1e12 / self.micro_batch_size,
            backward_ratio=self.backward_ratio,
        )

    def link(self, schedule: Schedule) -> Link:
        """See Source: tensors are [n, b, hidden] in 16 bits."""
        if self.bandwidth is None:
            return Link(latency=self.latency)
        lengths = self.lengths(schedule.num_splits)
        token_bytes = 2 * self.micro_batch_size * self.hidden_size
        return Link(
            latency=self.latency,
            bandwidth=self.bandwidth * 1e9,
            tensor_bytes=tuple(float(length * token_bytes) for length in lengths),
        )

    def memory(self, schedule: Schedule) -> Memory:
        """See Source."""
        head = self.hidden_size // self.heads
        return Memory.of_transformer(
            schedule,
            self.lengths(schedule.num_splits),
            num_layers=self.layers,
            hidden_size=self.hidden_size,
            kv_size=(self.query_groups or self.heads) * head,
            batch_size=self.micro_batch_size,
        )


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
