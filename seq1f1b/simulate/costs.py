"""How long actions take, and how long tensors travel."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from seq1f1b.errors import Seq1F1BError
from seq1f1b.schedule import Action, Kind, Schedule, Span
from seq1f1b.sequence import PackedCost, TokenCost, sub_sequences

Part = tuple[Kind, int, int]
"""Kind, model chunk and sub-sequence: what actions of all micro-batches that cost alike share."""

_PART = re.compile(r"(\d+)([FBIW])\.(\d+)")

_COMPUTE = (Kind.F, Kind.B, Kind.I, Kind.W)


class CostError(Seq1F1BError, ValueError):
    """Costs that do not fit the schedule."""


@dataclass(frozen=True)
class Costs:
    """Duration of every computation: for each stage, by kind, model chunk and sub-sequence."""

    stages: tuple[Mapping[Part, float], ...]

    def of(self, stage: int, action: Action) -> float:
        """Return how long ``action`` takes on ``stage``; raises CostError if that is unknown."""
        part = (action.kind, action.chunk, action.sub_sequence)
        if stage >= len(self.stages) or part not in self.stages[stage]:
            raise CostError(f"no cost is known for {action} on stage {stage}")
        return self.stages[stage][part]

    @classmethod
    def uniform(cls, schedule: Schedule, *, forward: float = 1.0, backward: float = 2.0) -> "Costs":
        """Share out a stage's ``forward`` and ``backward`` of one whole micro-batch evenly.

        A backward in two halves takes half its time in each.
        """
        share = 1.0 / (schedule.num_chunks * schedule.num_splits)
        return cls.of_forwards(
            schedule,
            [forward * share] * schedule.num_splits,
            backward_ratio=backward / forward,
        )

    @classmethod
    def of_tokens(
        cls,
        schedule: Schedule,
        cost: TokenCost | PackedCost,
        lengths: Sequence[int],
        *,
        flops_per_second: float,
        backward_ratio: float = 2.0,
    ) -> "Costs":
        """Deal a model's ``cost`` evenly to all model chunks, for sub-sequences of ``lengths``.

        Of a backward, W is half of what projections take; attention has no weights, so all of its
        backward is in I.
        """
        if len(lengths) != schedule.num_splits:
            raise CostError(f"{len(lengths)} lengths for {schedule.num_splits} sub-sequences")
        speed = flops_per_second * schedule.num_stages * schedule.num_chunks
        forwards = [cost.of(part.start, part.stop) / speed for part in sub_sequences(lengths)]
        weights = [cost.linear * length / speed * backward_ratio / 2 for length in lengths]
        return cls.of_forwards(schedule, forwards, weights, backward_ratio=backward_ratio)

    @classmethod
    def of_chunks(
        cls,
        stages: Sequence[Sequence[TokenCost]],
        lengths: Sequence[int],
        *,
        flops_per_second: float,
        backward_ratio: float = 2.0,
    ) -> "Costs":
        """Cost every stage's model chunks by what each of them computes.

        ``stages`` has for each stage the operations of its chunks: their own layers, and the output
        layer in the last. ``lengths`` are those of sub-sequences.
        """
        parts = sub_sequences(lengths)
        every: list[Mapping[Part, float]] = []
        for chunks in stages:
            times: dict[Part, float] = {}
            for chunk, cost in enumerate(chunks):
                for part in parts:
                    forward = cost.of(part.start, part.stop) / flops_per_second
                    backward = forward * backward_ratio
                    weight = cost.linear * part.length / flops_per_second * backward_ratio / 2
                    each = (forward, backward, backward - weight, weight)
                    for kind, seconds in zip(_COMPUTE, each, strict=True):
                        times[kind, chunk, part.index] = seconds
            every.append(times)
        return cls(tuple(every))

    @classmethod
    def of_forwards(
        cls,
        schedule: Schedule,
        forwards: Sequence[float],
        weights: Sequence[float] | None = None,
        *,
        backward_ratio: float,
    ) -> "Costs":
        """Make all stages and chunks equal: ``forwards[j]`` is F of sub-sequence j.

        ``weights[j]`` is its W, half of its B unless given.
        """
        parts: dict[Part, float] = {}
        for j, forward in enumerate(forwards):
            backward = forward * backward_ratio
            weight = backward / 2 if weights is None else weights[j]
            times = dict(zip(_COMPUTE, (forward, backward, backward - weight, weight), strict=True))
            for chunk in range(schedule.num_chunks):
                parts |= {(kind, chunk, j): time for kind, time in times.items()}
        return cls((parts,) * schedule.num_stages)

    @classmethod
    def measured(cls, stages: Iterable[Iterable[Span]]) -> "Costs":
        """Take the mean over micro-batches of what each stage measured."""
        return cls(tuple(_means(entries) for entries in stages))

    def named(self) -> list[dict[str, float]]:
        """Return each stage's costs by name: ``0F.2`` is F of chunk 0 on sub-sequence 2."""
        return [
            {f"{chunk}{kind}.{j}": cost for (kind, chunk, j), cost in parts.items()}
            for parts in self.stages
        ]

    @classmethod
    def of_names(cls, stages: Iterable[Mapping[str, float]]) -> "Costs":
        """Read what ``named`` wrote; raises CostError for a name that it does not write."""
        return cls(tuple({_part(name): cost for name, cost in each.items()} for each in stages))

    def completed(self) -> "Costs":
        """Fill in what backwards cost that were not measured: B as I and W, either as half a B."""
        return Costs(tuple(_completed(parts) for parts in self.stages))

    def total(self, kind: Kind) -> float:
        """Return what a micro-batch costs in actions of one kind, on a stage on average."""
        seconds = [parts[part] for parts in self.stages for part in parts if part[0] is kind]
        return math.fsum(seconds) / len(self.stages)

    def merged(self, num_chunks: int, num_splits: int) -> "Costs":
        """Return the costs of coarser actions: all chunks, all sub-sequences or both in one.

        ``num_chunks`` and ``num_splits`` are as many as there are now, or 1.
        """
        return Costs(tuple(_merged(parts, num_chunks, num_splits) for parts in self.stages))


@dataclass(frozen=True)
class CostsByMicroBatch:
    """Costs that differ from one micro-batch to the next, as those of packed documents do."""

    each: tuple[Costs, ...]

    def of(self, stage: int, action: Action) -> float:
        """See Costs; raises CostError for a micro-batch that has none."""
        if action.micro_batch >= len(self.each):
            raise CostError(
                f"no cost is known for {action}: there are {len(self.each)} micro-batches of costs"
            )
        return self.each[action.micro_batch].of(stage, action)


@dataclass(frozen=True)
class Link:
    """What carries a tensor from one stage to the next; both directions at the same time.

    latency: seconds. bandwidth: bytes per second, for one tensor at a time.
    tensor_bytes: of the tensor of each sub-sequence; none means that only latency counts.
    """

    latency: float = 0.0
    bandwidth: float = math.inf
    tensor_bytes: tuple[float, ...] = ()

    def transfer(self, sub_sequence: int) -> float:
        """Return for how many seconds a sub-sequence's tensor occupies the link."""
        return self.tensor_bytes[sub_sequence] / self.bandwidth if self.tensor_bytes else 0.0


def read_roots(text: str) -> tuple[int, ...]:
    """Read numbers from 0 between commas, of each stage's root of the PCIe tree.

    Raises ValueError.
    """
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{text!r} is not a list of numbers such as 0,0,1,1")
    return tuple(map(int, numbers))


@dataclass(frozen=True)
class HostLink:
    """What copies model chunks from host memory to the device, and their gradients back.

    Both directions at the same time. weights, gradients: bytes of every stage's model chunks.
    bandwidth: bytes per second one way. roots: for each stage the root of the PCIe tree whose link
    it shares with the stages of the same number; without, each has its own. uplink: bytes per
    second one way that stages of one root share evenly, none getting more than ``bandwidth``;
    without, they take turns with all of that.
    """

    weights: tuple[tuple[float, ...], ...]
    gradients: tuple[tuple[float, ...], ...]
    bandwidth: float = math.inf
    roots: tuple[int, ...] | None = None
    uplink: float | None = None

    @classmethod
    def uniform(
        cls,
        schedule: Schedule,
        *,
        weights: float,
        gradients: float,
        bandwidth: float = math.inf,
        roots: tuple[int, ...] | None = None,
    ) -> "HostLink":
        """Return the link of model chunks that are all of one size."""
        shape = schedule.num_stages, schedule.num_chunks
        return cls(
            ((weights,) * shape[1],) * shape[0],
            ((gradients,) * shape[1],) * shape[0],
            bandwidth,
            roots,
        )

    def check(self, schedule: Schedule) -> None:
        """Raise CostError unless every model chunk and every stage of ``schedule`` is described."""
        for name, stages in (("weights", self.weights), ("gradients", self.gradients)):
            counts = [len(chunks) for chunks in stages]
            if counts != [schedule.num_chunks] * schedule.num_stages:
                raise CostError(
                    f"{name} of {counts} model chunks by stage; the schedule has "
                    f"{schedule.num_chunks} on each of {schedule.num_stages} stages"
                )
        if self.roots is not None and len(self.roots) != schedule.num_stages:
            raise CostError(f"roots of {len(self.roots)} stages for {schedule.num_stages}")
        for bandwidth in (self.bandwidth, self.uplink):
            if bandwidth is not None and not bandwidth > 0.0:
                raise CostError(f"a bandwidth of {bandwidth:g} bytes/s copies nothing")

    def root(self, stage: int) -> int:
        """Return the number of the link that a stage's copies take."""
        return stage if self.roots is None else self.roots[stage]


def _part(name: str) -> Part:
    match = _PART.fullmatch(name)
    if match is None:
        raise CostError(f"{name!r} names no computation (expected something like 0F.1)")
    return Kind(match[2]), int(match[1]), int(match[3])


def _means(entries: Iterable[Span]) -> Mapping[Part, float]:
    seconds: defaultdict[Part, list[float]] = defaultdict(list)
    for entry in entries:
        action = entry.action
        if action.kind.is_compute:
            part = (action.kind, action.chunk, action.sub_sequence)
            seconds[part].append(entry.end - entry.start)
    return {part: math.fsum(values) / len(values) for part, values in seconds.items()}


def _completed(parts: Mapping[Part, float]) -> Mapping[Part, float]:
    filled = dict(parts)
    for kind, chunk, j in parts:
        if kind is Kind.B:
            half = parts[kind, chunk, j] / 2
            filled.setdefault((Kind.I, chunk, j), half)
            filled.setdefault((Kind.W, chunk, j), half)
        elif kind is Kind.W and (Kind.I, chunk, j) in parts:
            both = parts[Kind.I, chunk, j] + parts[kind, chunk, j]
            filled.setdefault((Kind.B, chunk, j), both)
    return filled


def _merged(parts: Mapping[Part, float], num_chunks: int, num_splits: int) -> Mapping[Part, float]:
    merged: defaultdict[Part, float] = defaultdict(float)
    for (kind, chunk, j), seconds in parts.items():
        part = (kind, 0 if num_chunks == 1 else chunk, 0 if num_splits == 1 else j)
        merged[part] += seconds
    return dict(merged)
