"""Step time by when model chunks in host memory are updated, over a paced link.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/offload_updates.py

Every rank is one pipeline stage, pinned to a core of its own, on which it computes and updates.
Adam's learning rate is 0, so that all steps of all contenders are the same, and none clips: the
norm is below --clip-grad, which is 0 for updates on arrival. Contenders take turns, each for some
steps in a row of which the first does not count, since updates of a step run beside the next.
Copies are paced as in offload.py.
"""

# ruff: noqa: E402

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from gpt import TINY, Trainer, add_model_arguments, be_a_stage, make_batch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from offload import SHARE, add_arguments, busiest, report, run_in_turn

from seq1f1b.schedule import num_loads

_ABOVE_ANY_NORM = 1e9


@dataclass(frozen=True)
class Contender:
    """When chunks are updated: behind the step, beside the next or, without clip, beside both."""

    name: str
    just_in_time: bool
    clip: float = _ABOVE_ANY_NORM


FIELD = (
    Contender("after the step", just_in_time=False),
    Contender("just in time", just_in_time=True),
    Contender("on arrival", just_in_time=True, clip=0.0),
)


class Bench:
    """This rank's stage with its optimizer, and the link that is paced by what stages compute."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trainer = Trainer(
            options, make_batch(options), session, options.chunks, flat_buffers=True
        )
        self.config = OptimizerConfig(
            optimizer="adam", lr=0.0, weight_decay=0.0, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(
            self.config, self.trainer.chunks, use_gloo_process_groups=False
        )
        plain = self.trainer.settings("1f1b", 1, "average")
        self.settings = replace(plain, turn=options.micro_batches)

    def step(self, contender: Contender) -> dict[str, Any]:
        """Run a step and its update; return what it was, and the seconds of ``optimizer.step``."""
        settings = replace(self.settings, offload_just_in_time=contender.just_in_time)
        self.config.clip_grad = contender.clip
        self.optimizer.zero_grad()
        figures = self.trainer.step(settings, self.options.micro_batches)
        start = time.perf_counter()
        self.optimizer.step()
        return figures | {"updating": time.perf_counter() - start}

    def pace(self) -> None:
        """Choose the link's pace by steps with all chunks resident, the first of them to warm up.

        Rank 0's number is everybody's.
        """
        computing = busiest([self.step(FIELD[0]) for _ in range(3)][1:])
        chunks, slots = self.options.chunks, self.options.slots
        weights = sum(b.param_data.nbytes for c in self.trainer.chunks for b in c.buffers)
        found = [num_loads(chunks, slots) * weights / chunks / (SHARE * computing) / 1e9]
        dist.broadcast_object_list(found)
        self.settings = replace(
            self.settings,
            offload_chunks=slots,
            offload_prefetch=True,
            offload_gb_per_second=found[0],
        )

    def run(self, contender: Contender) -> dict[str, Any]:
        """Run steps in a row; return the seconds of each behind the first, and the last one."""
        self.step(contender)
        start = time.perf_counter()
        for _ in range(self.options.steps):
            last = self.step(contender)
        seconds = (time.perf_counter() - start) / self.options.steps
        session.updates.settle_all()
        return last | {"seconds": seconds}

    def measure(self) -> list[dict[str, Any]]:
        """Alternate all contenders and return a row for each."""
        runs = run_in_turn(FIELD, self.options.rounds, self.run)
        first = [run["seconds"] for run in runs[FIELD[0].name]]
        return [
            {
                "contender": name,
                "seconds_median": statistics.median(run["seconds"] for run in each),
                "seconds": [run["seconds"] for run in each],
                "over_first": statistics.median(
                    run["seconds"] / base for run, base in zip(each, first, strict=True)
                ),
                "updating_seconds": statistics.median(run["updating"] for run in each),
            }
            for name, each in runs.items()
        ]


HEADER = (
    "| updates | s/step | over the first, of the same round | seconds in optimizer.step() |\n"
    "|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    """Return ``row`` as a line of the table."""
    return (
        f"| {row['contender']} | {row['seconds_median']:.3f} | {row['over_first']:.3f} | "
        f"{row['updating_seconds']:.3f} |"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=8, hidden=512)
    parser.set_defaults(**TINY, length=64)
    add_arguments(parser, micro_batches=4, rounds=9)
    parser.add_argument("--steps", type=int, default=5, help="of a contender in a row")
    options = parser.parse_args()
    be_a_stage()
    bench = Bench(options)
    bench.pace()
    rate = bench.settings.offload_gb_per_second * 1e9
    report(options, rate, bench.measure(), HEADER, line, steps_in_a_row=options.steps)


if __name__ == "__main__":
    main()
