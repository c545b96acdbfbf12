"""Times every action of a stage alone on the machine, and replays all schedules of many stages.

    python benchmarks/replay.py

The stages of a deep pipeline do not fit a small machine side by side, but their actions can be
timed one stage at a time: the first (with the embedding), one from the middle (the others do the
same work) and the last (with the output layer). The simulator then plays the schedules with these
times, for as many stages as asked, and says where the distance from theory comes from. Links take
no time.
"""

# ruff: noqa: E402

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from alone import Bench, Cut, be_alone
from gpt import about_model, add_model_arguments
from report import sentence, show

from seq1f1b.schedule import Kind, Schedule, interleaved, peak_live, zb_h1
from seq1f1b.simulate import Costs, greedy, peak_memory, simulate

SHAPES = ["4x8", "4x16", "8x8", "8x16"]
MIB = 2**20


@dataclass(frozen=True)
class Baseline:
    """1F1B, with its measured costs, in one shape."""

    schedule: Schedule
    costs: Costs

    def speedup(self, schedule: Schedule, costs: Costs, own: Costs) -> float:
        """Return how much faster ``schedule`` is at ``costs`` than 1F1B at ``own`` costs."""
        own_time = simulate(self.schedule, own).step_time
        return own_time / simulate(schedule, costs).step_time


def schedules(num_stages: int, m: int, cut: Cut, costs: Costs) -> Iterator[Schedule]:
    """Yield every schedule of this cut whose actions were timed."""
    v, s = cut.num_chunks, cut.num_splits
    yield interleaved(num_stages, v, m, s)
    if True not in cut.halves:
        return
    if v == 1:
        yield zb_h1(num_stages, m, s)
    yield greedy(num_stages, v, m, s, costs)


def levelled(costs: Costs, *, splits: bool) -> Costs:
    """Make all stages and chunks alike, and sub-sequences too if ``splits``; totals stay."""
    sums: defaultdict[Any, float] = defaultdict(float)
    counts: defaultdict[Any, int] = defaultdict(int)
    for parts in costs.stages:
        for (kind, _, j), seconds in parts.items():
            key = kind, None if splits else j
            sums[key] += seconds
            counts[key] += 1

    def mean(kind: Kind, j: int) -> float:
        key = kind, None if splits else j
        return sums[key] / counts[key]

    return Costs(tuple({part: mean(part[0], part[2]) for part in parts} for parts in costs.stages))


def _scaled(costs: Costs, factor: float) -> Costs:
    return Costs(
        tuple({part: factor * time for part, time in parts.items()} for parts in costs.stages)
    )


def distance(base: Baseline, schedule: Schedule, costs: Costs) -> dict[str, float]:
    """Go from the speedup in theory to the replayed one in steps, and say what each step takes.

    In theory all actions of a kind are equal, I and W are half a backward, and splitting costs
    nothing. Each step puts one piece of the measurement in place of that; the last one does so for
    both schedules. Theory and steps add up to the speedup.
    """
    even, base_even = levelled(costs, splits=True), levelled(base.costs, splits=True)
    work = sum(simulate(schedule, costs).busy) / sum(simulate(base.schedule, base.costs).busy)
    theory = base.speedup(schedule, Costs.uniform(schedule), Costs.uniform(base.schedule))
    halves = base.speedup(schedule, _scaled(even, 1 / work), base_even)
    worked = base.speedup(schedule, even, base_even)
    cut = base.speedup(schedule, levelled(costs, splits=False), base_even)
    whole = base.speedup(schedule, costs, base.costs)
    return {
        "speedup_in_theory": theory,
        "points_halves": halves - theory,
        "points_work": worked - halves,
        "points_cuts": cut - worked,
        "points_stages": whole - cut,
    }


STEPS = ("points_halves", "points_work", "points_cuts", "points_stages")


def table(bench: Bench, num_stages: int, m: int) -> list[dict[str, Any]]:
    """Replay every schedule; the first row, 1F1B, is what the others are compared with."""
    rows: list[dict[str, Any]] = []
    base = Baseline(interleaved(num_stages, 1, m), bench.costs(bench.cuts[0], num_stages))
    plain = simulate(base.schedule, base.costs)
    for cut in bench.cuts:
        costs = bench.costs(cut, num_stages)
        memory = bench.memory(cut, "first")
        for schedule in schedules(num_stages, m, cut, costs):
            result = simulate(schedule, costs)
            has_theory = schedule.name != "greedy"
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
                    "speedup": plain.step_time / result.step_time,
                    "work_over_1f1b": sum(result.busy) / sum(plain.busy),
                    "peak_live_first_stage": peak_live(schedule)[0]
                    / (cut.num_splits * cut.num_chunks),
                    "peak_bytes_first_stage": peak_memory(result, memory)[0],
                    **(distance(base, schedule, costs) if has_theory else {}),
                }
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest row of each schedule, and what uniform_comp gains over average."""
    fastest: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["schedule"]
        name += f", v={row['chunks']}" if name == "greedy" else ""
        if name not in fastest or row["speedup"] > fastest[name]["speedup"]:
            fastest[name] = row
    times = {
        (row["schedule"], row["splits"], row["balance"]): row["step_time"]
        for row in rows
        if row["schedule"] != "greedy"
    }
    return {
        "fastest": fastest,
        "uniform_over_average": {
            (name, splits): seconds / times[name, splits, "uniform_comp"]
            for (name, splits, balance), seconds in times.items()
            if balance == "average"
        },
    }


def _about_runs(bench: Bench) -> str:
    if bench.scatter is None:
        return "Each stage ran once."
    return (
        "Of each stage's runs the fastest counts; the second fastest was "
        f"{bench.scatter:.1%} slower\n(median over all stages and cuts)."
    )


HEADER = """\
Stages timed one at a time, alone on one core, and replayed in the simulator. *layers* are those of
a stage.

{setting}

{runs} *speedup* is over 1F1B. *theory* is the simulated speedup where all actions of
a kind take equally long, F = I = W, and cutting costs nothing. The next four columns add up to the
difference between the two: *halves*: F, I and W are not equal; *work*: what all computing takes
together differs from 1F1B's (1F1B has 1.000 in *computing*); *cuts*: sub-sequences take unequal
time; *stages*: the first has the embedding, the last the output layer, in 1F1B too. *live*: what
the first stage holds at most, in micro-batches. *MiB*: the same as activations and KV carry, each
weighed once, over time in the simulator; tensors kept for a W after its I are not in it, nor are
those allocated and freed inside an action. Greedy has no theory.
"""


def markdown(tables: list[list[dict[str, Any]]], header: str) -> str:
    """Return the report."""
    lines = [header, *_fastest_lines(tables), "", *_uniform_lines(tables)]
    for rows in tables:
        lines += [
            "",
            f"### p = {rows[0]['stages']}, m = {rows[0]['micro_batches']}",
            "",
            "| schedule | v | s | balance | step s | speedup | theory | halves | work | cuts | "
            "stages | bubble | computing | live | MiB |",
            "|" + "---|" * 15,
        ]
        for row in rows:
            theory = _number(row.get("speedup_in_theory"), ".3f")
            steps = " | ".join(_number(row.get(step), "+.3f") for step in STEPS)
            lines.append(
                f"| {row['schedule']} | {row['chunks']} | {row['splits']} | "
                f"{row['balance'] or '-'} | {row['step_time']:.2f} | {row['speedup']:.3f} | "
                f"{theory} | {steps} | {row['bubble_ratio']:.3f} | "
                f"{row['work_over_1f1b']:.3f} | {row['peak_live_first_stage']:.2f} | "
                f"{row['peak_bytes_first_stage'] / MIB:.1f} |"
            )
    return "\n".join(lines) + "\n"


def _shape(rows: list[dict[str, Any]]) -> str:
    return f"p={rows[0]['stages']} m={rows[0]['micro_batches']}"


def _fastest_lines(tables: list[list[dict[str, Any]]]) -> Iterator[str]:
    found = [summary(rows)["fastest"] for rows in tables]
    yield "### Each schedule at its best cut: speedup over 1F1B (s, where cut)"
    yield ""
    yield "| schedule | " + " | ".join(map(_shape, tables)) + " |"
    yield "|" + "---|" * (len(tables) + 1)
    for name in found[0]:
        rows = [fastest[name] for fastest in found]
        cells = (
            f"{row['speedup']:.3f}"
            + (f" ({row['splits']}, {row['balance']})" if row["splits"] > 1 else "")
            for row in rows
        )
        yield f"| {name} | " + " | ".join(cells) + " |"
    leads = (
        fastest["seq1f1b-interleaved"]["speedup"] / fastest["1f1b-interleaved"]["speedup"]
        for fastest in found
    )
    yield (
        "| *seq1f1b-interleaved over 1f1b-interleaved* | "
        + " | ".join(f"{lead:.3f}" for lead in leads)
        + " |"
    )


def _uniform_lines(tables: list[list[dict[str, Any]]]) -> Iterator[str]:
    gains = [summary(rows)["uniform_over_average"] for rows in tables]
    yield "### Throughput of uniform_comp over average"
    yield ""
    yield "| schedule | s | " + " | ".join(map(_shape, tables)) + " |"
    yield "|" + "---|" * (len(tables) + 2)
    for name, splits in sorted(gains[0]):
        cells = (f"{gain[name, splits]:.3f}" for gain in gains)
        yield f"| {name} | {splits} | " + " | ".join(cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=2, hidden=192)
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2], help="the first is 1")
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, help="stages x micro-batches, as in 8x16"
    )
    parser.add_argument(
        "--pool", type=Path, help="a file of all runs, to which further calls add theirs"
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    be_alone()
    bench = Bench(options, session)
    bench.time_all()
    if options.pool:
        bench.pool(options.pool)
    tables = [table(bench, *map(int, shape.split("x"))) for shape in options.shapes]
    about = about_model(options, tokens=options.length, rounds=bench.num_rounds)
    report = markdown(tables, HEADER.format(setting=sentence(about), runs=_about_runs(bench)))
    show(report, options.output, about, [row for rows in tables for row in rows])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
