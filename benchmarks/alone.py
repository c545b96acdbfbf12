"""Times and weighs every action of a stage that has the machine to itself, wherever its place is.

Each action is what training runs: Megatron's layers under our executor, in an order that respects
the KV carry. Only the neighbours are missing: what they would send is made up, what they would get
is thrown away.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import forward_step, make_batch, make_config, make_groups, make_part, token_cost, wrap
from report import device_name

from megatron.adaptor.session import Session
from megatron.adaptor.step.step import Step, StepArguments
from seq1f1b.runtime import ActionClock, ActivationMeter
from seq1f1b.schedule import Action, Kind, Plan, Schedule, interleaved
from seq1f1b.sequence import SubSequence, partition, sub_sequences
from seq1f1b.simulate import Costs, Memory

ROLES = ("first", "middle", "last")
Parts = dict[tuple[Kind, int, int], float]


@dataclass(frozen=True)
class Cut:
    """How the work is cut: model chunks a stage, sub-sequences a micro-batch, and where."""

    num_chunks: int
    num_splits: int
    balance: str

    @property
    def roles(self) -> tuple[str, ...]:
        """Which stages to time: with two chunks, those of a middle stage are in the others."""
        return ROLES if self.num_chunks == 1 else ("first", "last")

    @property
    def halves(self) -> tuple[bool, ...]:
        """Whether to run whole backwards (False) and split ones; of even lengths only whole."""
        return (False,) if self.balance == "average" and self.num_splits > 1 else (False, True)


class _Nowhere:
    """A link that accepts everything and hands out tensors ``[n, 1, width]`` at once."""

    def __init__(self, parts: Sequence[SubSequence], width: int, dtype: torch.dtype) -> None:
        self.parts, self.width = parts, width
        self.options: dict[str, Any] = {"device": torch.cuda.current_device(), "dtype": dtype}

    def receive(self, action: Action) -> Any:
        length = self.parts[action.sub_sequence].length
        return _There(torch.randn(length, 1, self.width, **self.options))

    def send(self, action: Action, tensor: torch.Tensor) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass
class _There:
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


class _Watched(ActionClock):
    """A clock that calls ``after`` when an F, B or I has ended."""

    def __init__(self, after: Callable[[Action], None]) -> None:
        super().__init__()
        self.after = after

    def end(self, action: Action) -> None:
        super().end(action)
        if action.kind is not Kind.W:
            self.after(action)


def be_alone(core: int = 0) -> None:
    """Take one core and one thread for this process, and Megatron's groups of one rank."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {core})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    make_groups()


def plan(cut: Cut, *, split: bool) -> Schedule:
    """Return three stages that each run one micro-batch's forwards, then its backwards."""
    shape = interleaved(len(ROLES), cut.num_chunks, 1, cut.num_splits)
    stages = tuple(tuple(_actions(shape, stage, split=split)) for stage in range(len(ROLES)))
    return shape.with_stages(stages, lowered=True)


def _actions(shape: Schedule, stage: int, *, split: bool) -> Iterator[Action]:
    parts = list(product(range(shape.num_chunks), range(shape.num_splits)))
    for chunk, j in parts:
        forward = Action(Kind.F, chunk, 0, j)
        if shape.upstream(stage, chunk):
            yield forward.of_kind(Kind.RECV_F)
        yield forward
        if shape.downstream(stage, chunk):
            yield forward.of_kind(Kind.SEND_F)
    for chunk, j in reversed(parts):
        backward = Action(Kind.I if split else Kind.B, chunk, 0, j)
        if shape.downstream(stage, chunk):
            yield backward.of_kind(Kind.RECV_B)
        yield backward
        if shape.upstream(stage, chunk):
            yield backward.of_kind(Kind.SEND_B)
        if split:
            yield backward.of_kind(Kind.W)


class Bench:
    """The model parts of all roles, and what their actions took.

    options: of the model, ``rounds``, ``splits`` and ``chunks``. roles: which stages to look at.
    """

    def __init__(
        self, options: argparse.Namespace, session: Session, roles: Sequence[str] = ROLES
    ) -> None:
        self.options, self.session, self.batch = options, session, make_batch(options)
        self.roles = roles
        torch.manual_seed(1)
        self.cuts = [
            Cut(v, s, balance)
            for v in options.chunks
            for s in options.splits
            for balance in (("average", "uniform_comp") if s > 1 else ("average",))
        ]
        self.chunks = {
            (cut.num_chunks, role): self._build(cut.num_chunks, role)
            for cut in self.cuts
            if cut.num_splits == options.splits[0]
            for role in self._roles(cut)
        }
        self.runs: dict[tuple[Cut, str, bool], list[Parts]] = {
            (cut, role, split): []
            for cut in self.cuts
            for role in self._roles(cut)
            for split in cut.halves
        }

    def _roles(self, cut: Cut) -> list[str]:
        return [role for role in cut.roles if role in self.roles]

    def _build(self, num_chunks: int, role: str) -> list[Any]:
        layers = self.options.layers // num_chunks
        config = make_config(self.options, layers, gradient_accumulation_fusion=True)
        return wrap(
            [
                make_part(
                    self.options,
                    config,
                    first=role == "first" and chunk == 0,
                    last=role == "last" and chunk == num_chunks - 1,
                )
                for chunk in range(num_chunks)
            ]
        )

    def time_all(self) -> None:
        """Time every action of every cut, in turn, so that drift hits all of them."""
        for role in self._roles(self.cuts[0]):  # warms caches and allocators up
            self.run(self.cuts[0], role, split=False)
        for _ in range(self.options.rounds):
            for (cut, role, split), runs in self.runs.items():
                runs.append(self.run(cut, role, split=split))

    def pool(self, file: Path) -> None:
        """Keep all runs in ``file``, and take those of earlier calls in."""
        earlier = json.loads(file.read_text()) if file.exists() else {}
        for key, runs in self.runs.items():
            for run in earlier.get(_name(*key), ()):
                runs.append({Action.parse(a)[:2] + Action.parse(a)[3:]: t for a, t in run.items()})
        kept = {
            _name(*key): [
                {str(Action(kind, chunk, 0, j)): time for (kind, chunk, j), time in run.items()}
                for run in runs
            ]
            for key, runs in self.runs.items()
        }
        file.write_text(json.dumps(kept) + "\n")

    @property
    def num_rounds(self) -> int:
        """How often each stage ran."""
        return min(map(len, self.runs.values()))

    @property
    def scatter(self) -> float | None:
        """By what share the second fastest run of a stage is slower than its fastest, in median.

        None after a single round.
        """
        if self.num_rounds < 2:
            return None
        slower = []
        for runs in self.runs.values():
            fastest, second, *_ = sorted(sum(parts.values()) for parts in runs)
            slower.append(second / fastest - 1)
        return statistics.median(slower)

    def costs(self, cut: Cut, num_stages: int) -> Costs:
        """Return the times for a pipeline of ``num_stages``."""
        of = {role: self._fastest(cut, role) for role in cut.roles}
        middle = of.get("middle") or _between(of["first"], of["last"])
        return Costs((of["first"], *[middle] * (num_stages - 2), of["last"]))

    def seconds(self, cut: Cut, role: str) -> float:
        """Return how long a stage takes for all forwards and whole backwards of a micro-batch."""
        times = self._fastest(cut, role)
        return sum(time for (kind, *_), time in times.items() if kind in (Kind.F, Kind.B))

    def memory(self, cut: Cut, role: str) -> Memory:
        """Weigh what a model chunk of a stage holds for a micro-batch, in bytes.

        That is memory allocated after an action and not before it, without what is allocated and
        freed inside the action.
        """
        context = self.session.context
        carries, on_cuda = context.carries, device_name() != "cpu"
        meter = ActivationMeter(
            carries, context.weight_gradients, device="cuda" if on_cuda else "cpu"
        )
        chunks = self.chunks[cut.num_chunks, role]
        constants = [
            t for chunk in chunks for t in (*chunk.parameters(), *torch.nn.Module.buffers(chunk))
        ]

        def live() -> int:
            if on_cuda:
                return torch.cuda.memory_allocated() - carries.bytes_held
            return meter.live_bytes

        held, carried = list[int](), list[int]()

        def weigh(action: Action) -> None:
            if action.kind is Kind.F:
                held.append(live())
            carried.append(carries.bytes_in_use)

        for _ in range(2):  # the first time fills the pool of the carry
            held[:], carried[:] = [live()], [0]
            with meter.measuring(constants):
                self.run(cut, role, split=False, after=weigh)
        grown = [after - before for before, after in pairwise(held)]
        carry = carried[len(grown)]
        return Memory(
            tuple(sum(grown[j :: cut.num_splits]) / len(chunks) for j in range(cut.num_splits)),
            carry=carry / len(chunks),
            accumulator=(max(carried) - carry) / len(chunks),
        )

    def _fastest(self, cut: Cut, role: str) -> Parts:
        """Return all times of the fastest run, since other work on the machine only ever adds.

        Not the fastest of each action, which would favour fine cuts: more numbers have more luck.
        """
        whole, *halves = (
            min(self.runs[cut, role, split], key=lambda parts: sum(parts.values()))
            for split in cut.halves
        )
        return (halves[0] if halves else {}) | whole

    def run(
        self,
        cut: Cut,
        role: str,
        *,
        split: bool,
        after: Callable[[Action], None] = lambda action: None,
    ) -> Parts:
        """Run all actions of ``role`` for one micro-batch; return how long each took."""
        chunks = self.chunks[cut.num_chunks, role]
        lengths = partition(
            self.options.length,
            cut.num_splits,
            method=cut.balance,
            cost=token_cost(self.options),
        )
        parts = sub_sequences(lengths)
        arguments = StepArguments(
            forward_step_func=forward_step,
            data_iterator=[repeat(self.batch)] * len(chunks),
            model=chunks,
            num_microbatches=1,
            seq_length=self.options.length,
            micro_batch_size=1,
        )
        step = Step(
            arguments,
            Plan(plan(cut, split=split), (parts,)),
            self.session.context,
            self.session.cutter,
            arguments.feeds((), repeats=cut.num_splits > 1),
            splits_backwards=split,
            stage=ROLES.index(role),
        )
        config = arguments.config
        clock = _Watched(after)
        step.run(_Nowhere(parts, config.hidden_size, config.pipeline_dtype), clock)
        return {
            (timed.action.kind, timed.action.chunk, timed.action.sub_sequence): timed.end
            - timed.start
            for timed in clock.finish()[0]
        }


def _name(cut: Cut, role: str, split: bool) -> str:
    return " ".join(map(str, (*asdict(cut).values(), role, split)))


def _between(first: Parts, last: Parts) -> Parts:
    """Return a middle stage's two chunks: the last stage's first and the first stage's last."""
    return {part: (last if part[1] == 0 else first)[part] for part in first}
