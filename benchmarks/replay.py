"""Times every action of a stage alone on the machine, and replays all schedules of many stages.

    python benchmarks/replay.py

The stages of a deep pipeline do not fit a small machine side by side, but their actions can be
timed one stage at a time: the first (with the embedding), one from the middle (the others do the
same work) and the last (with the output layer). Each action is what training runs: Megatron's
layers under our executor, in an order that respects the KV carry. The simulator then plays the
schedules with these times, for as many stages as asked. Links take no time.
"""

# ruff: noqa: E402

import argparse
import datetime
import json
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

import torch

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from gpt import (
    add_model_arguments,
    forward_step,
    make_batch,
    make_config,
    make_groups,
    make_part,
    token_cost,
    wrap,
)

from megatron.adaptor.settings import Settings
from megatron.adaptor.step import Step
from seq1f1b.runtime import ActionClock
from seq1f1b.schedule import Action, Kind, Schedule, interleaved, peak_live, zb_h1
from seq1f1b.simulate import Costs, greedy, simulate
from seq1f1b.simulate.formulas import speedup_over_1f1b

ROLES = ("first", "middle", "last")
Parts = dict[tuple[Kind, int, int], float]


@dataclass(frozen=True)
class Cut:
    """How the work is cut: model chunks a stage, sub-sequences a micro-batch, and where."""

    num_chunks: int
    num_splits: int
    balance: str


@dataclass(frozen=True)
class _Planned(Settings):
    """Settings of a step whose schedule is given."""

    plan: Schedule | None = None

    def schedule(self, *shape: Any, **others: Any) -> Schedule:
        assert self.plan is not None
        return self.plan


class _Nowhere:
    """A link that takes everything and hands out tensors of the right shape at once."""

    def __init__(self, step: Step, width: int) -> None:
        self.parts, self.width = step.parts, width

    def receive(self, action: Action) -> Any:
        return _There(
            torch.randn(self.parts[action.micro_batch][action.sub_sequence].length, 1, self.width)
        )

    def send(self, action: Action, tensor: torch.Tensor) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass
class _There:
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


class _Alone(Step):
    """A step of one stage with nobody around it."""

    def _transport(self, groups: Any) -> Any:
        return _Nowhere(self, self.config.hidden_size)


def alone(cut: Cut, *, split: bool) -> Schedule:
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
    """The model parts of the three roles, and what their actions took."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.batch = options, make_batch(options)
        torch.manual_seed(1)
        self.chunks = {
            (num_chunks, role): self._build(num_chunks, role)
            for num_chunks in (1, 2)
            for role in ROLES
        }
        self.cuts = [
            Cut(v, s, balance)
            for v in (1, 2)
            for s in options.splits
            for balance in (("average", "uniform_comp") if s > 1 else ("average",))
        ]
        self.seconds: dict[tuple[Cut, str], defaultdict[Any, list[float]]] = {
            (cut, role): defaultdict(list) for cut in self.cuts for role in ROLES
        }

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
        for round_number in range(self.options.rounds + 1):
            cuts = self.cuts if round_number else self.cuts[:1]
            for cut, role, split in product(cuts, ROLES, (False, True)):
                timed = self._run(cut, role, split=split)
                for entry in timed if round_number else ():
                    kind, chunk, _, j = entry.action
                    seconds = self.seconds[cut, role][kind, chunk, j]
                    seconds.append(entry.end - entry.start)

    def _run(self, cut: Cut, role: str, *, split: bool) -> list[Any]:
        chunks = self.chunks[cut.num_chunks, role]
        settings = _Planned(
            num_splits=cut.num_splits,
            balance_method=cut.balance,
            attention=None,
            metrics_file=None,
            sequence_length=self.options.length,
            multiple=1,
            cost=token_cost(self.options),
            plan=alone(cut, split=split),
        )
        step = _Alone(
            settings,
            session.context,
            session.cutter,
            forward_step_func=forward_step,
            data_iterator=[repeat(self.batch)] * len(chunks),
            model=chunks,
            num_microbatches=1,
            seq_length=self.options.length,
            micro_batch_size=1,
        )
        step.stage = ROLES.index(role)
        clock = ActionClock()
        step.run({}, clock)
        return clock.finish()[0]

    def costs(self, cut: Cut, num_stages: int) -> Costs:
        """Return the median times for a pipeline of ``num_stages``."""
        first, middle, last = (self._median(cut, role) for role in ROLES)
        return Costs((first, *[middle] * (num_stages - 2), last))

    def _median(self, cut: Cut, role: str) -> Parts:
        return {part: statistics.median(times) for part, times in self.seconds[cut, role].items()}


def schedules(num_stages: int, m: int, cut: Cut, costs: Costs) -> Iterator[Schedule]:
    """Yield every schedule of this cut."""
    v, s = cut.num_chunks, cut.num_splits
    yield interleaved(num_stages, v, m, s)
    if v == 1:
        yield zb_h1(num_stages, m, s)
    yield greedy(num_stages, v, m, s, costs)


def table(bench: Bench, num_stages: int, m: int) -> list[dict[str, Any]]:
    """Replay every schedule; the first row, 1F1B, is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    whole = bench.costs(bench.cuts[0], num_stages)
    base = simulate(interleaved(num_stages, 1, m), whole)
    for cut in bench.cuts:
        costs = bench.costs(cut, num_stages)
        for schedule in schedules(num_stages, m, cut, costs):
            result = simulate(schedule, costs)
            closed = schedule.name not in ("greedy", "zb-h1", "seq1f1b-zb-h1")
            theory = (
                speedup_over_1f1b(num_stages, cut.num_chunks, m, cut.num_splits) if closed else None
            )
            speedup = base.step_time / result.step_time
            longest, mean = max(result.busy), sum(result.busy) / num_stages
            rows.append(
                {
                    "stages": num_stages,
                    "micro_batches": m,
                    "schedule": schedule.name,
                    "chunks": cut.num_chunks,
                    "splits": cut.num_splits,
                    "balance": cut.balance if cut.num_splits > 1 else None,
                    "step_time": result.step_time,
                    "bubble_ratio": result.bubble_ratio,
                    "speedup": speedup,
                    "speedup_in_theory": theory,
                    "work_over_1f1b": sum(result.busy) / sum(base.busy),
                    "longest_stage_over_mean": longest / mean,
                    "idle_of_longest_stage": 1 - longest / result.step_time,
                    "peak_live_first_stage": peak_live(schedule)[0]
                    / (cut.num_splits * cut.num_chunks),
                }
            )
    return rows


def markdown(tables: list[list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Return the report."""
    lines = [
        f"{options.layers} layers a stage, hidden {options.hidden_size}, {options.heads} heads, "
        f"vocabulary {options.vocab_size}, {options.length} tokens, float32, actions timed alone "
        f"on one core (medians of {options.rounds} rounds); torch {torch.__version__}; "
        f"{platform.machine()}, {datetime.date.today()}.",
        "",
        "*work*: computing time of all stages over that of 1F1B. *longest stage*: its computing "
        "time over the mean of all. *its idle*: the share of the step that the longest stage "
        "waits. *live*: what the first stage holds at most, in micro-batches.",
    ]
    for rows in tables:
        lines += [
            "",
            f"### p = {rows[0]['stages']}, m = {rows[0]['micro_batches']}",
            "",
            "| schedule | v | s | balance | step s | speedup | theory | bubble | work | "
            "longest stage | its idle | live |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            theory = row["speedup_in_theory"]
            lines.append(
                f"| {row['schedule']} | {row['chunks']} | {row['splits']} | "
                f"{row['balance'] or '-'} | {row['step_time']:.2f} | {row['speedup']:.3f} | "
                f"{'-' if theory is None else format(theory, '.3f')} | "
                f"{row['bubble_ratio']:.3f} | {row['work_over_1f1b']:.3f} | "
                f"{row['longest_stage_over_mean']:.3f} | {row['idle_of_longest_stage']:.3f} | "
                f"{row['peak_live_first_stage']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=2, hidden=256)
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {0})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    make_groups()
    bench = Bench(options)
    bench.time_all()
    tables = [table(bench, p, m) for p, m in ((4, 8), (4, 16), (8, 8), (8, 16))]
    report = markdown(tables, options)
    print(report)
    if options.output:
        rows = [row for rows in tables for row in rows]
        options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
