"""How much longer a stage computes while a neighbour's core computes as well.

    python benchmarks/neighbour.py

Two processes, a core and a thread each. One times the forward and backward of a micro-batch on the
last stage, whole and in sub-sequences; the other waits, spins in its registers, or computes the
same. Cores share clock, caches and memory, so what runs beside a stage that waits runs faster: a
schedule with fewer bubbles has less of that.
"""

# ruff: noqa: E402

import argparse
import multiprocessing
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import megatron.adaptor

session = megatron.adaptor.install()

from alone import Bench, Cut, be_alone
from gpt import TINY, about_model, add_model_arguments
from report import show, table

ROLE = "last"
WAIT, SPIN, COMPUTE, END = range(4)
MODES = {WAIT: "waits", SPIN: "spins", COMPUTE: "computes the same"}
SECONDS_TO_SETTLE = 0.5
HEADER = """\
| the neighbour | sub-sequences | ms | over a neighbour that waits |
|---|---|---|---|"""


class Stage:
    """The last stage on a core of its own, run in one way of cutting after the other."""

    def __init__(self, options: argparse.Namespace, core: int) -> None:
        be_alone(core)
        self._bench = Bench(options, session, roles=(ROLE,))
        for splits in options.splits:  # warms caches and allocators up
            self.run(splits)

    def run(self, splits: int) -> float:
        """Return the seconds of a micro-batch's forwards and backwards."""
        times = self._bench.run(Cut(1, splits, "uniform_comp"), ROLE, split=False)
        return sum(times.values())


def be_the_neighbour(options: argparse.Namespace, mode: Any, ready: Any) -> None:
    """Do what ``mode`` says until it says END."""
    stage = Stage(options, core=1)
    ready.set()
    while mode.value != END:
        if mode.value == WAIT:
            time.sleep(0.01)
        elif mode.value == COMPUTE:
            stage.run(options.splits[-1])


def measure(options: argparse.Namespace, stage: Stage, mode: Any) -> list[dict[str, Any]]:
    """Run all cuts beside each kind of neighbour, in turn; return a row for each pair."""
    seconds: dict[tuple[int, int], list[float]] = {
        key: [] for key in product(MODES, options.splits)
    }
    for _ in range(options.rounds):
        for mode.value in MODES:
            time.sleep(SECONDS_TO_SETTLE)
            for _, splits in product(range(options.repeats), options.splits):
                seconds[mode.value, splits].append(stage.run(splits))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        {
            "neighbour": MODES[kind],
            "splits": splits,
            "ms": 1e3 * median[kind, splits],
            "over_waiting": median[kind, splits] / median[WAIT, splits],
        }
        for kind, splits in median
    ]


def line(row: dict[str, Any]) -> str:
    """Return the row of the table."""
    return f"| {row['neighbour']} | {row['splits']} | {row['ms']:.1f} | {row['over_waiting']:.3f} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=1, hidden=256)
    parser.set_defaults(**TINY)
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=8, help="how often the neighbour changes")
    parser.add_argument("--repeats", type=int, default=4, help="runs of each cut until it does")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    options.chunks = [1]
    processes = multiprocessing.get_context("spawn")
    mode, ready = processes.Value("i", WAIT, lock=False), processes.Event()
    neighbour = processes.Process(target=be_the_neighbour, args=(options, mode, ready), daemon=True)
    neighbour.start()
    stage = Stage(options, core=0)
    while not ready.wait(timeout=1):
        if not neighbour.is_alive():
            raise SystemExit("the neighbour has ended")
    rows = measure(options, stage, mode)
    mode.value = END
    neighbour.join()
    about = about_model(options, tokens=options.length)
    report = table(about, HEADER, map(line, rows))
    show(report, options.output, about, rows)


if __name__ == "__main__":
    main()
