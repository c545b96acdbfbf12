"""Step time and memory of Megatron's 1F1B loop and of Seq1F1B, alternating, on one model.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/schedules.py

Every rank is one pipeline stage, pinned to a core of its own and to one thread. All schedules run
the same GPT on the same micro-batches in one process, in turn (A B C, B C A ...), so that a change
in the machine's speed hits all of them; medians are compared. The report says what theory allows
beside what was measured.
"""

# ruff: noqa: E402

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from gpt import TINY, Trainer, about_model, add_model_arguments, be_a_stage, make_batch
from report import show, table
from turns import in_turn

from megatron.adaptor.command_line.settings import Settings
from seq1f1b.sequence import imbalance
from seq1f1b.simulate.formulas import bubble_ratio, live_micro_batches, speedup_over_1f1b

MIB = 2**20


@dataclass(frozen=True)
class Contender:
    """A schedule: in Megatron's own loop (auto) or in the executor, on how many splits, cut how.

    multiple: what lengths are multiples of.
    """

    name: str
    kind: str = "1f1b"
    num_splits: int = 1
    balance: str = "average"
    multiple: int = 1

    def settings(self, trainer: Trainer) -> Settings:
        """Return what the flags of Seq1F1B would say."""
        return trainer.settings(self.kind, self.num_splits, self.balance, self.multiple)


def contenders(splits: list[int], multiples: list[int]) -> list[Contender]:
    """Return Megatron's loop first, which is what all others are compared with."""
    cut = [
        Contender(f"Seq1F1B s={s} {balance}" + f" in {n}s" * (n > 1), "1f1b", s, balance, n)
        for s in splits
        for balance, ns in (("average", [1]), ("uniform_comp", multiples))
        for n in ns
    ]
    return [
        Contender("Megatron 1F1B loop", "auto"),
        Contender("executor, 1 split"),
        *cut,
    ]


def measure(trainer: Trainer, num_micro_batches: int) -> list[dict[str, Any]]:
    """Alternate all contenders and return a row for each."""
    field = contenders(trainer.options.splits, trainer.options.multiples)
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in field}
    for round_number, contender in in_turn(field, trainer.options.rounds + 1):
        figures = trainer.step(contender.settings(trainer), num_micro_batches)
        if round_number:  # the first round warms caches and allocators up
            runs[contender.name].append(figures)
    median = {
        name: statistics.median(run["seconds"] for run in done) for name, done in runs.items()
    }
    lengths = {
        contender.name: [
            part.length for part in contender.settings(trainer).cut(trainer.options.length)
        ]
        for contender in field
    }
    stages = dist.get_world_size()
    return [
        {
            "schedule": contender.name,
            "micro_batches": num_micro_batches,
            "splits": contender.num_splits,
            "lengths": lengths[contender.name],
            "imbalance": imbalance(lengths[contender.name], trainer.cost),
            "seconds_median": median[contender.name],
            "speedup": median[field[0].name] / median[contender.name],
            "speedup_in_theory": speedup_over_1f1b(
                stages, 1, num_micro_batches, contender.num_splits
            ),
            "bubble": [
                statistics.median(column)
                for column in zip(*(run["bubble"] for run in runs[contender.name]), strict=True)
            ],
            "busy_seconds": [
                statistics.median(column)
                for column in zip(*(run["busy"] for run in runs[contender.name]), strict=True)
            ],
            "bubble_in_theory": bubble_ratio(stages, 1, num_micro_batches, contender.num_splits),
            "peak_mib": [number / MIB for number in runs[contender.name][-1]["peak_bytes"]],
            "carry_mib": [number / MIB for number in runs[contender.name][-1]["carry_bytes"]],
            "live_micro_batches_in_theory": live_micro_batches(
                stages, num_micro_batches, contender.num_splits
            ),
            "loss": runs[contender.name][-1]["loss"],
        }
        for contender in field
    ]


HEADER = (
    "| m | schedule | s/step | speedup | theory | computing s by stage | bubble by stage | "
    "theory | activation MiB by stage | of which KV carry |\n|" + "---|" * 10
)


def line(row: dict[str, Any]) -> str:
    """Return ``row`` as a line of the table."""
    return (
        f"| {row['micro_batches']} | {row['schedule']} | {row['seconds_median']:.3f} | "
        f"{row['speedup']:.3f} | {row['speedup_in_theory']:.3f} | "
        f"{_joined(row['busy_seconds'], '.3f')} | "
        f"{_joined(row['bubble'], '.3f')} | {row['bubble_in_theory']:.3f} | "
        f"{_joined(row['peak_mib'], '.1f')} | {_joined(row['carry_mib'], '.1f')} |"
    )


def _joined(numbers: list[float], form: str) -> str:
    return ", ".join(format(number, form) for number in numbers)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=2, hidden=256)
    parser.set_defaults(**TINY)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--splits", type=int, nargs="+", default=[4])
    parser.add_argument(
        "--multiples", type=int, nargs="+", default=[1], help="see --seq1f1b-multiple"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    be_a_stage()
    trainer = Trainer(options, make_batch(options), session, num_chunks=1)
    rows = [row for m in options.micro_batches for row in measure(trainer, m)]
    if dist.get_rank() == 0:
        about = about_model(
            options,
            tokens=options.length,
            stages=dist.get_world_size(),
            threads_a_stage=1,
            alternating_rounds=options.rounds,
        )
        report = table(about, HEADER, map(line, rows))
        show(report, options.output, about, rows)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
