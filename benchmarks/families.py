"""Every schedule, Megatron's loops and torch's on one model, alternating, and the simulator's word.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/families.py

Every rank is one pipeline stage, pinned to a core of its own and to one thread. Schedules run in
turn; medians are compared. For each that our clock can follow, the times of the actions of every
step are replayed in the simulator, and its word on the speedup stands beside the measured one.
"""

# ruff: noqa: E402

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from gpt import Trainer, about_model, add_model_arguments, be_a_stage, make_batch, make_chunks
from report import show, table
from torch_pipelining import SCHEDULES, TorchTrainer
from turns import in_turn

from seq1f1b.schedule import Schedule, interleaved, lower
from seq1f1b.simulate import Costs, Link, simulate
from seq1f1b.simulate.formulas import speedup_over_1f1b


@dataclass(frozen=True)
class Contender:
    """A schedule: in Megatron's own loop (auto) or in the executor.

    timed_by: whose actions, the same ones in the same order, stand in for its own.
    """

    name: str
    kind: str = "auto"
    num_splits: int = 1
    num_chunks: int = 1
    timed_by: str | None = None

    @property
    def speedup_in_theory(self) -> float | None:
        """The closed form where all stages and halves of a backward are equal, if there is one."""

        def theory(stages: int, micro_batches: int) -> float | None:
            if self.kind in ("zb-h1", "greedy"):
                return None
            return speedup_over_1f1b(stages, self.num_chunks, micro_batches, self.num_splits)

        return theory(dist.get_world_size(), _NUM_MICRO_BATCHES)


_NUM_MICRO_BATCHES = 4
_INTERLEAVED = "executor, interleaved, v=2"
FIELD = (
    Contender("Megatron 1F1B loop"),
    Contender("Megatron interleaved loop, v=2", num_chunks=2, timed_by=_INTERLEAVED),
    Contender(_INTERLEAVED, "1f1b", num_chunks=2),
    Contender("Seq1F1B s=4", "1f1b", 4),
    Contender("Seq1F1B interleaved v=2 s=2", "1f1b", 2, 2),
    Contender("Seq1F1B interleaved v=2 s=4", "1f1b", 4, 2),
    Contender("Seq1F1B ZB-H1 s=4", "zb-h1", 4),
    Contender("greedy s=4", "greedy", 4),
    Contender("greedy v=2 s=4", "greedy", 4, 2),
)


def measure_link(length: int, width: int) -> Callable[[int], float]:
    """Time one tensor from stage to stage; return seconds as a function of its tokens."""

    def one_way(tokens: int) -> float:
        tensor, times = torch.zeros(tokens, width), []
        peer = 1 - dist.get_rank()
        for _ in range(9):
            dist.barrier()
            start = time.perf_counter()
            for sends in (True, False):
                if sends == (dist.get_rank() == 0):
                    dist.send(tensor, peer)
                else:
                    dist.recv(tensor, peer)
            times.append((time.perf_counter() - start) / 2)
        return statistics.median(times)

    latency, whole = one_way(1), one_way(length)
    return lambda tokens: latency + (whole - latency) * tokens / length


def planned(contender: Contender, settings: Any) -> Schedule:
    """Return the schedule that the contender ran."""
    stages, chunks = dist.get_world_size(), contender.num_chunks
    if contender.kind == "auto" and contender.num_splits == 1:
        return lower(interleaved(stages, chunks, _NUM_MICRO_BATCHES))
    return settings.schedule(stages, chunks, _NUM_MICRO_BATCHES, trains=True)


def replay(
    contender: Contender, trainer: Trainer, runs: dict[str, list[Any]], link_seconds: Any
) -> float:
    """Return the median of the steps simulated from the actions that each of them measured."""
    settings = trainer.settings(contender.kind, contender.num_splits, "uniform_comp")
    schedule = planned(contender, settings)
    lengths = [part.length for part in settings.cut(trainer.options.length)]
    link = Link(bandwidth=1.0, tensor_bytes=tuple(link_seconds(n) for n in lengths))
    return statistics.median(
        simulate(schedule, Costs.measured(run["timed"]).completed(), link).step_time
        for run in runs[contender.timed_by or contender.name]
    )


def check_losses(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise RuntimeError unless all schedules have computed the same thing."""
    losses = {name: done[-1]["loss"] for name, done in runs.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise RuntimeError(f"the losses differ: {losses}")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate all schedules and return a row for each."""
    batch = make_batch(options)
    trainers = {v: Trainer(options, batch, session, v) for v in (1, 2)}
    of_torch = {
        name: TorchTrainer(
            name, make_chunks(options, v, accumulates=False), batch, _NUM_MICRO_BATCHES
        )
        for name, (_, v) in SCHEDULES.items()
    }
    link_seconds = measure_link(options.length, options.hidden_size)
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        c.name: partial(
            trainers[c.num_chunks].step,
            trainers[c.num_chunks].settings(c.kind, c.num_splits, "uniform_comp"),
            _NUM_MICRO_BATCHES,
        )
        for c in FIELD
    } | {name: trainer.step for name, trainer in of_torch.items()}
    names = list(steps)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for round_number, name in in_turn(names, options.rounds + 1):
        figures = steps[name]()
        if round_number:  # the first round warms caches and allocators up
            runs[name].append(figures)
    median = {n: statistics.median(run["seconds"] for run in done) for n, done in runs.items()}
    check_losses(runs)
    simulated = {c.name: replay(c, trainers[c.num_chunks], runs, link_seconds) for c in FIELD}
    theory = {c.name: c.speedup_in_theory for c in FIELD}
    base = names[0]

    def row(name: str) -> dict[str, Any]:
        speedup, replayed = median[base] / median[name], simulated.get(name)
        predicted = replayed and simulated[base] / replayed
        return {
            "schedule": name,
            "seconds_median": median[name],
            "speedup": speedup,
            "speedup_in_theory": theory.get(name),
            "seconds_replayed": replayed,
            "speedup_replayed": predicted,
            "measured_over_replayed": predicted and speedup / predicted,
            "activation_mib": [n / 2**20 for n in runs[name][-1].get("peak_bytes", ())],
            "loss": runs[name][-1]["loss"],
        }

    return [row(name) for name in names]


NOTES = """
*replayed*: every step is played in the simulator with the mean times of the actions of that very
step; what the medians say. Megatron's interleaved loop is replayed with the times of the same
actions in the executor. torch's schedules have no clock of ours. *theory*: all stages and
sub-sequences equal, links free.

Alike for all: model, weights, tokens, number of micro-batches, attention kernel, process group
library, cores; every loss agrees to 1e-4. Not alike: Megatron's loop and the executor run
Megatron's data-parallel wrapper (one replica), which adds weight gradients into one buffer within
the matrix product, and count activation memory (our meter); torch's schedules run the bare modules,
whose gradients autograd adds up, and count nothing. Their split backward (zero bubble) is torch's
own.
"""


HEADER = (
    "| schedule | s/step | speedup | replayed | measured / replayed | theory | "
    "activation MiB by stage |\n|" + "---|" * 7
)


def line(row: dict[str, Any]) -> str:
    """Return ``row`` as a line of the table."""
    numbers = (
        row["speedup"],
        row["speedup_replayed"],
        row["measured_over_replayed"],
        row["speedup_in_theory"],
    )
    cells = " | ".join("-" if number is None else f"{number:.3f}" for number in numbers)
    memory = ", ".join(f"{number:.1f}" for number in row["activation_mib"]) or "-"
    return f"| {row['schedule']} | {row['seconds_median']:.3f} | {cells} | {memory} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=4, hidden=192)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    be_a_stage()
    rows = measure(options)
    if dist.get_rank() == 0:
        about = about_model(
            options,
            tokens=options.length,
            micro_batches=_NUM_MICRO_BATCHES,
            stages=dist.get_world_size(),
            threads_a_stage=1,
            cuts="uniform_comp",
            alternating_rounds=options.rounds,
        )
        report = table(about, HEADER, map(line, rows)) + NOTES
        show(report, options.output, about, rows)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
