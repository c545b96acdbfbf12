"""Step time with model chunks in host memory over a paced link, and what the simulator says.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/offload.py

Every rank is one pipeline stage, pinned to a core of its own and to one thread. Copies of model
chunks are paced (--offload-link-gb-per-s): the link is as fast as lets the loads of a step of one
turn take half as long as the busiest stage computes. All contenders run the same GPT on the same
micro-batches in one process, in turn (A B C, B C A ...), and medians are compared. Beside each
stands what the simulator makes of the times of that run's own actions and the bytes of its chunks,
and what it says where all actions of a kind are equal and a backward takes two forwards.
"""

# ruff: noqa: E402

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from gpt import TINY, Trainer, about_model, add_model_arguments, be_a_stage, make_batch
from report import show, table
from turns import in_turn

from megatron.adaptor.command_line.settings import Settings
from seq1f1b.schedule import Schedule, num_loads
from seq1f1b.simulate import Costs, HostLink, Simulation, simulate

SHARE = 0.5
"""Of the time that the busiest stage computes, what the loads of a step of one turn take."""


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Contender:
    """How model chunks come to the device; one_turn: of all micro-batches, else of one a stage."""

    name: str
    visits: bool = True
    prefetch: bool = True
    one_turn: bool = True
    shared: bool = False


FIELD = (
    Contender("all chunks resident", visits=False),
    Contender("prefetched"),
    Contender("not prefetched", prefetch=False),
    Contender("prefetched, default turns", one_turn=False),
    Contender("prefetched, shared root", shared=True),
)


def busiest(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds that the busiest stage computes in a step, of medians by stage."""
    return max(map(statistics.median, zip(*(run["busy"] for run in runs), strict=True)))


def run_in_turn[T: Named](
    field: Sequence[T], rounds: int, run: Callable[[T], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """Return by its name what each contender's runs were, which must have the same loss."""
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in field}
    for _, contender in in_turn(field, rounds):
        runs[contender.name].append(run(contender))
    losses = {run["loss"] for each in runs.values() for run in each}
    assert len(losses) == 1, f"the same micro-batches have losses {sorted(losses)}"
    return runs


class Bench:
    """This rank's stage, and the link that is paced by what all stages compute."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trainer = Trainer(
            options, make_batch(options), session, options.chunks, flat_buffers=True
        )
        own = [
            (sum(b.param_data.nbytes for b in buffers), sum(b.grad_data.nbytes for b in buffers))
            for buffers in (chunk.buffers for chunk in self.trainer.chunks)
        ]
        sizes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, own)
        self.weights = tuple(tuple(float(w) for w, _ in stage) for stage in sizes)
        self.gradients = tuple(tuple(float(g) for _, g in stage) for stage in sizes)
        self.computing = 0.0
        self.bytes_per_second = 0.0

    def settings(self, contender: Contender) -> Settings:
        """Return what the flags would say."""
        options, plain = self.options, self.trainer.settings("1f1b", 1, "average")
        turn = options.micro_batches if contender.one_turn else dist.get_world_size()
        if not contender.visits:
            return replace(plain, turn=turn)
        return replace(
            plain,
            turn=turn,
            offload_chunks=options.slots,
            offload_prefetch=contender.prefetch,
            offload_gb_per_second=self.bytes_per_second / 1e9,
            offload_roots=(0,) * dist.get_world_size() if contender.shared else None,
        )

    def step(self, contender: Contender) -> dict[str, Any]:
        """Run a step and add what the simulator makes of its actions."""
        figures = self.trainer.step(self.settings(contender), self.options.micro_batches)
        schedule = self.schedule(contender)
        result = self.simulated(contender, schedule, Costs.measured(figures["timed"]))
        return figures | {
            "simulated": result.step_time,
            "copying": result.copying,
            "loads": [sum(a.kind.is_load for a in actions) for actions in schedule.stages],
        }

    def schedule(self, contender: Contender) -> Schedule:
        """Return what a step runs."""
        options = self.options
        sizes = dist.get_world_size(), options.chunks, options.micro_batches
        return self.settings(contender).schedule(*sizes, trains=True)

    def simulated(self, contender: Contender, schedule: Schedule, costs: Costs) -> Simulation:
        """Return what the simulator says, with the bytes of this model's chunks."""
        host_link = None
        if contender.visits:
            roots = (0,) * schedule.num_stages if contender.shared else None
            host_link = HostLink(self.weights, self.gradients, self.bytes_per_second, roots)
        return simulate(schedule, costs, host_link=host_link)

    def equal(self, contender: Contender) -> float:
        """Return the step over what a stage computes, where it computes in equal actions."""
        schedule, forward = self.schedule(contender), self.computing / self.options.micro_batches
        costs = Costs.uniform(schedule, forward=forward / 3, backward=forward * 2 / 3)
        return self.simulated(contender, schedule, costs).step_time / self.computing

    def pace(self, rounds: int) -> None:
        """Choose the link's pace by steps with all chunks resident, the first of them to warm up.

        Rank 0's number is everybody's.
        """
        runs = [self.step(FIELD[0]) for _ in range(rounds + 1)][1:]
        self.computing = busiest(runs)
        chunk = max(sum(stage) for stage in self.weights) / self.options.chunks
        loaded = num_loads(self.options.chunks, self.options.slots) * chunk
        found = [self.computing, loaded / (SHARE * self.computing)]
        dist.broadcast_object_list(found)
        self.computing, self.bytes_per_second = found

    def measure(self) -> list[dict[str, Any]]:
        """Alternate all contenders and return a row for each."""
        runs = run_in_turn(FIELD, self.options.rounds, self.step)
        computing = busiest(runs[FIELD[0].name])
        return [self.row(contender, runs[contender.name], computing) for contender in FIELD]

    def row(
        self, contender: Contender, runs: list[dict[str, Any]], computing: float
    ) -> dict[str, Any]:
        """Return medians; ``computing`` is that of the resident steps between the others."""
        seconds = statistics.median(run["seconds"] for run in runs)
        simulated = statistics.median(run["simulated"] for run in runs)
        return {
            "contender": contender.name,
            "seconds_median": seconds,
            "seconds": [run["seconds"] for run in runs],
            "over_computing": seconds / computing,
            "simulated_seconds_median": simulated,
            "simulated_over_computing": simulated / computing,
            "over_computing_of_equal_actions": self.equal(contender),
            "measured_over_simulated": statistics.median(
                run["seconds"] / run["simulated"] for run in runs
            ),
            "busy_seconds": [
                statistics.median(column)
                for column in zip(*(run["busy"] for run in runs), strict=True)
            ],
            "loads": runs[-1]["loads"] if contender.visits else [0] * dist.get_world_size(),
            "copying_seconds": runs[-1]["copying"],
            "loss": runs[-1]["loss"],
        }


HEADER = (
    "| contender | s/step | over computing | simulated | equal actions | measured over simulated | "
    "computing s by stage | loads by stage | copying s by stage: in + out |\n|" + "---|" * 9
)


def line(row: dict[str, Any]) -> str:
    """Return ``row`` as a line of the table."""
    copying = ", ".join(f"{into:.2f} + {out:.2f}" for into, out in row["copying_seconds"])
    return (
        f"| {row['contender']} | {row['seconds_median']:.3f} | {row['over_computing']:.2f} | "
        f"{row['simulated_over_computing']:.2f} | {row['over_computing_of_equal_actions']:.2f} | "
        f"{row['measured_over_simulated']:.3f} | "
        f"{', '.join(f'{busy:.2f}' for busy in row['busy_seconds'])} | "
        f"{', '.join(map(str, row['loads']))} | {copying} |"
    )


def add_arguments(parser: argparse.ArgumentParser, *, micro_batches: int, rounds: int) -> None:
    """Add what says how chunks visit the device, and how that is measured."""
    parser.add_argument("--chunks", type=int, default=4, help="model chunks of a stage")
    parser.add_argument("--slots", type=int, default=2, help="--offload-model-chunks")
    parser.add_argument("--micro-batches", type=int, default=micro_batches)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--note", help="about the machine at the time, for the report")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")


def report(
    options: argparse.Namespace,
    bytes_per_second: float,
    rows: Sequence[dict[str, Any]],
    header: str,
    line: Callable[[dict[str, Any]], str],
    **others: Any,
) -> None:
    """Show the table of ``rows`` on rank 0; others: what else it says about the setting."""
    if dist.get_rank() == 0:
        about = about_model(
            options,
            tokens=options.length,
            stages=dist.get_world_size(),
            chunks_a_stage=options.chunks,
            slots=options.slots,
            micro_batches=options.micro_batches,
            link_MB_per_s=round(bytes_per_second / 1e6, 2),
            threads_a_stage=1,
            **others,
            alternating_rounds=options.rounds,
            **({"note": options.note} if options.note else {}),
        )
        show(table(about, header, map(line, rows)), options.output, about, rows)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=8, hidden=256)
    parser.set_defaults(**TINY, length=1024)
    add_arguments(parser, micro_batches=8, rounds=5)
    options = parser.parse_args()
    be_a_stage()
    bench = Bench(options)
    bench.pace(rounds=2)
    report(options, bench.bytes_per_second, bench.measure(), HEADER, line)


if __name__ == "__main__":
    main()
