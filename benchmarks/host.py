"""What the executor itself costs the host per action, the model's code excluded.

    python benchmarks/host.py

Runs the schedule of one stage in the middle of a pipeline with a model and links that do nothing.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from report import setting, show, table

from seq1f1b.runtime import ActionClock, ExecutionContext, execute
from seq1f1b.schedule import Schedule, interleaved, lower, zb_h1
from seq1f1b.sequence import sub_sequences


class _Nothing:
    """A computation and a link without work."""

    def __init__(self) -> None:
        self._tensor = torch.zeros(1, requires_grad=True)

    def forward(self, action: Any, received: Any) -> torch.Tensor:
        return self._tensor

    def backward(self, action: Any, received: Any, output: Any, gradient: Any) -> torch.Tensor:
        return self._tensor

    def weight_gradients(self, action: Any) -> None:
        pass

    def output_sent(self, output: Any) -> None:
        pass

    def receive(self, action: Any) -> "_Nothing":
        return self

    def wait(self) -> torch.Tensor:
        return self._tensor

    def send(self, action: Any, tensor: Any) -> None:
        pass

    def finish(self) -> None:
        pass


def seconds_per_action(schedule: Schedule, stage: int) -> float:
    """Return the host's time for one computation, with its sends and receives."""
    nothing, context = _Nothing(), ExecutionContext()
    parts = [sub_sequences([1] * schedule.num_splits)] * schedule.num_micro_batches
    actions = schedule.stages[stage]
    computations = sum(action.kind.is_compute for action in actions)
    clock = ActionClock()
    start = time.perf_counter()
    execute(actions, nothing, nothing, context, parts, clock, stage=stage)
    return (time.perf_counter() - start) / computations


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=32)
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    p, m, s = options.stages, options.micro_batches, options.splits
    schedules = {
        "Seq1F1B": lower(interleaved(p, 1, m, s)),
        "Seq1F1B interleaved, v=2": lower(interleaved(p, 2, m, s)),
        "Seq1F1B ZB-H1": lower(zb_h1(p, m, s)),
    }
    times: dict[str, list[float]] = {name: [] for name in schedules}
    for _ in range(options.rounds):
        for name, schedule in schedules.items():
            times[name].append(seconds_per_action(schedule, p // 2))
    rows = [
        {"schedule": name, "us_per_action": 1e6 * statistics.median(found)}
        for name, found in times.items()
    ]
    about = setting(stages=p, micro_batches=m, splits=s, rounds=options.rounds)
    lines = [f"| {row['schedule']} | {row['us_per_action']:.1f} |" for row in rows]
    header = "| schedule | host us per action |\n|---|---|"
    report = table(about, header, lines)
    show(report, options.output, about, rows)


if __name__ == "__main__":
    main()
