"""What the planner predicts for this machine, beside what is measured here.

    seq1f1b calibrate
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/planner.py

Two ranks, each pinned to a core and one thread, train a tiny GPT with Megatron: two stages, or two
replicas of one. Every setting runs in turn with a reference setting, so that a change in the
machine's speed hits both; ratios of medians are compared with those that the planner's cost model
gives from the calibration, and peak activation bytes with those of its tensor trace.

On a machine that others use, wall time says more of them than of the settings. With --core-time
every action counts the time that its rank spent on the core, and a step is the schedule replayed
with those times.
"""

# ruff: noqa: E402

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from gpt import Trainer, about_model, add_model_arguments, be_a_rank, make_batch
from megatron.core import parallel_state, tensor_parallel
from report import show, table
from turns import in_turn

from seq1f1b.planner.cuts import fastest_cut
from seq1f1b.planner.gpu import THIS_MACHINE, gpu
from seq1f1b.planner.memory import trace_memory
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time import Kernels, StepTime, step_time
from seq1f1b.runtime import clock
from seq1f1b.simulate import Costs, simulate

_FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True)
class Case:
    """A tiny setting."""

    stages: int
    splits: int
    micro_batches: int
    length: int
    recompute: bool = False
    balance: str = "uniform_comp"
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        words = f"p={self.stages} s={self.splits} m={self.micro_batches} {self.length} tokens"
        if self.recompute:
            words += ", recomputed"
        if self.lengths is not None:
            return f"{words}, the planner's cut"
        return f"{words}, average" if self.balance == "average" else words


REFERENCE = Case(2, 1, 4, 1024)
CASES = (
    Case(2, 2, 4, 1024),
    Case(2, 4, 2, 1024),
    Case(2, 4, 8, 1024),
    Case(2, 8, 4, 1024),
    Case(2, 1, 2, 2048),
    Case(2, 2, 2, 2048),
    Case(2, 4, 2, 2048),
    Case(2, 8, 2, 2048),
    Case(2, 4, 4, 1024, recompute=True),
    Case(1, 1, 4, 1024),
    Case(1, 4, 2, 2048),
    Case(1, 1, 2, 1024, recompute=True),
)


RANKED = (
    Case(2, 1, 2, 2048),
    *(
        Case(2, splits, 2, 2048, balance=balance)
        for splits in (2, 4, 8)
        for balance in ("uniform_comp", "average")
    ),
    Case(1, 1, 1, 2048),
)
"""Eight ways to train on two sequences a step."""


def setting_of(options: argparse.Namespace, case: Case) -> Setting:
    """Return the case as the planner has it."""
    values: dict[str, Any] = {
        "num_layers": options.layers,
        "hidden_size": options.hidden_size,
        "num_attention_heads": options.heads,
        "seq_length": case.length,
        "padded_vocab_size": options.vocab_size,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "transformer_impl": "local",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": False,
        "micro_batch_size": 1,
        "global_batch_size": case.micro_batches * (2 // case.stages),
        "pipeline_model_parallel_size": case.stages,
        "seq1f1b_splits": case.splits,
        "seq1f1b_balance_method": case.balance,
        "seq1f1b_lengths": case.lengths,
    }
    if options.query_groups:
        values |= {"group_query_attention": True, "num_query_groups": options.query_groups}
    return resolve(values | (_FULL if case.recompute else {}), num_gpus=2)


class Ranks:
    """Megatron's process groups for one and for two stages, made once each."""

    def __init__(self) -> None:
        self._untouched = self._state()
        self._made: dict[int, dict[str, Any]] = {}

    def enter(self, stages: int) -> None:
        """Let Megatron's global state report this number of stages."""
        if stages not in self._made:
            vars(parallel_state).update(self._untouched)
            parallel_state.initialize_model_parallel(
                pipeline_model_parallel_size=stages, create_gloo_process_groups=False
            )
            self._made[stages] = self._state()
        vars(parallel_state).update(self._made[stages])
        tensor_parallel.model_parallel_cuda_manual_seed(1)

    @staticmethod
    def _state() -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(parallel_state).items()
            if name.startswith("_") and name.isupper()
        }


class Field:
    """Trainers of all cases, made when first asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.ranks = options, Ranks()
        self._trainers: dict[tuple[int, int, bool], Trainer] = {}

    def step(self, case: Case) -> dict[str, Any]:
        """Run one step of a case."""
        self.ranks.enter(case.stages)
        key = case.stages, case.length, case.recompute
        if key not in self._trainers:
            options = argparse.Namespace(**{**vars(self.options), "length": case.length})
            trainer = Trainer(options, make_batch(options), session, 1)
            if case.recompute:
                for name, value in _FULL.items():
                    setattr(trainer.config, name, value)
            self._trainers[key] = trainer
        trainer = self._trainers[key]
        settings = trainer.settings("auto", case.splits, case.balance, lengths=case.lengths)
        return trainer.step(settings, case.micro_batches)

    def measured(self, case: Case) -> float:
        """Run one step of a case; return its length, by the wall or replayed."""
        done = self.step(case)
        return replayed(self.options, case, done) if self.options.core_time else done["seconds"]


def rank(field: Field, cases: tuple[Case, ...], rounds: int) -> list[dict[str, Any]]:
    """Run cases in turn; return a row for each, the first of the planner's order first."""
    found: dict[Case, list[float]] = {case: [] for case in cases}
    for number, case in in_turn(cases, rounds + 1):
        length = field.measured(case)
        if number:
            found[case].append(length)
    rows = [
        {
            "case": str(case),
            "lengths": setting_of(field.options, case).lengths,
            "seconds": statistics.median(found[case]),
            "predicted_seconds": seconds(predicted(field.options, case), field.options.core_time),
        }
        for case in cases
    ]
    return sorted(rows, key=lambda row: row["predicted_seconds"])


def planned_cut(options: argparse.Namespace, case: Case) -> Case:
    """Return a case with the lengths of the shortest step that the planner simulates."""
    kernels, profile = Kernels(gpu(options.gpu)), runtime("cpu")
    best = fastest_cut(
        setting_of(options, case), lambda setting: step_time(setting, kernels, profile).pipeline
    )
    return replace(case, lengths=best.lengths)


def compare(field: Field, case: Case, reference: Case, rounds: int) -> dict[str, Any]:
    """Run a case and the reference in turn; return medians and what the planner predicts."""
    found: dict[Case, list[float]] = {case: [], reference: []}
    figures: dict[str, Any] = {}
    for number in range(rounds + 1):
        for one in (case, reference) if number % 2 else (reference, case):
            done = field.step(one)
            if number:
                found[one].append(
                    replayed(field.options, one, done)
                    if field.options.core_time
                    else done["seconds"]
                )
            if one == case:
                figures = done
    measured = {one: statistics.median(times) for one, times in found.items()}
    ours, others = (predicted(field.options, one) for one in (case, reference))
    core_time = field.options.core_time
    trace = trace_memory(ours.setting, runtime("cpu"))
    stages = [stage.activations for stage in trace.stages]
    ratio = measured[case] / measured[reference]
    expected = seconds(ours, core_time) / seconds(others, core_time)
    return {
        "case": str(case),
        "measured_seconds": measured[case],
        "reference_seconds": measured[reference],
        "predicted_seconds": seconds(ours, core_time),
        "ratio": ratio,
        "predicted_ratio": expected,
        "error": expected / ratio - 1,
        "absolute_error": seconds(ours, core_time) / measured[case] - 1,
        "activation_bytes": figures["peak_bytes"][: case.stages],
        "predicted_bytes": stages,
        "memory_errors": [
            mine / theirs - 1 for mine, theirs in zip(stages, figures["peak_bytes"], strict=False)
        ],
    }


def replayed(options: argparse.Namespace, case: Case, done: dict[str, Any]) -> float:
    """Return the length of a step whose actions take what they took, if nothing else ran."""
    setting = setting_of(options, case)
    step = predicted(options, case)
    costs = Costs.measured(done["timed"][: case.stages])
    return simulate(setting.schedule(), costs, step.link).step_time


def predicted(options: argparse.Namespace, case: Case) -> StepTime:
    """Return the planner's step of a case."""
    described = gpu(options.gpu)
    return step_time(setting_of(options, case), Kernels(described), runtime("cpu"))


def seconds(step: StepTime, core_time: bool) -> float:
    """Return what a measured pass holds: the pipeline and, by the wall, the reduction."""
    return step.pipeline + (0.0 if core_time else step.reduction)


HEADER = (
    "| setting | s/step | predicted | error | ratio to reference | predicted | error | "
    "activation MiB by stage | predicted | worst error |\n|" + "---|" * 10
)


def line(row: dict[str, Any]) -> str:
    """Return ``row`` as a line of the table."""
    memory = [
        ", ".join(f"{number / 2**20:.1f}" for number in row[name])
        for name in ("activation_bytes", "predicted_bytes")
    ]
    worst = max(row["memory_errors"], key=abs)
    return (
        f"| {row['case']} | {row['measured_seconds']:.3f} | {row['predicted_seconds']:.3f} | "
        f"{row['absolute_error']:+.1%} | {row['ratio']:.3f} | {row['predicted_ratio']:.3f} | "
        f"{row['error']:+.1%} | {memory[0]} | {memory[1]} | {worst:+.1%} |"
    )


def show_ranking(field: Field) -> None:
    """Measure and print the eight ways, or the cuts."""
    options, cases = field.options, RANKED
    if options.cuts:
        cases = tuple(
            one
            for number in (2, 4)
            for case in [Case(2, 4, number, options.length)]
            for one in (
                Case(2, 1, number, options.length),
                case,
                replace(case, balance="average"),
                planned_cut(options, case),
            )
        )
    rows = rank(field, cases, options.rounds)
    if dist.get_rank() == 0:
        about = about_model(options, rounds=options.rounds, core_time=options.core_time)
        lines = [
            f"| {row['case']} | {', '.join(map(str, row['lengths']))} | {row['seconds']:.3f} | "
            f"{row['predicted_seconds']:.3f} |"
            for row in rows
        ]
        header = "| setting | lengths | s/step | predicted |\n|" + "---|" * 4
        show(table(about, header, lines), options.output, about, rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=4, hidden=256)
    parser.set_defaults(heads=4, vocab_size=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gpu", default=THIS_MACHINE, help="a description by name or path")
    parser.add_argument("--core-time", action="store_true", help="replay time spent on the core")
    parser.add_argument("--rank", action="store_true", help="rank eight ways of the same work")
    parser.add_argument("--cuts", action="store_true", help="set the planner's cut beside others")
    parser.add_argument("--cases", type=int, default=len(CASES), help="run only the first CASES")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    be_a_rank()
    if options.core_time:
        clock.time = argparse.Namespace(perf_counter=time.process_time)
    field = Field(options)
    if options.rank or options.cuts:
        show_ranking(field)
        return
    rows = []
    for case in CASES[: options.cases]:
        rows.append(compare(field, case, REFERENCE, options.rounds))
        if dist.get_rank() == 0:
            print(line(rows[-1]), flush=True)
    if dist.get_rank() == 0:
        about = about_model(options, rounds=options.rounds, reference=str(REFERENCE))
        report = table(about, HEADER, [line(row) for row in rows])
        show(report, options.output, about, rows)


if __name__ == "__main__":
    main()
