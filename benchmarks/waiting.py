"""How long the device waits for the host while a stage computes, over the length of sub-sequences.

    python benchmarks/waiting.py --hidden-size 4096 --heads 32 --layers 4 --dtype bfloat16

Traces the forwards and backwards of one micro-batch on a middle stage, alone on the device. The
device waits for the host when it runs out of work: what runs next was launched only after all
before it had ended. On a CPU an operator is its own launch, so all time between operators counts.
"""

# ruff: noqa: E402

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from alone import Bench, Cut, be_alone
from gpt import about_model, add_model_arguments
from report import device_name, save, table
from torch.profiler import ProfilerActivity, profile

ROLE = "middle"
WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCHES = {"cuda_runtime", "cuda_driver"}
HEADER = """\
| tokens of a sub-sequence | s | ms | idle | waiting for the host |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Waiting:
    """Microseconds from a device's first to its last work, and how many of them had none."""

    span: float
    idle: float
    for_host: float


def waiting(events: Iterable[dict[str, Any]]) -> Waiting:
    """Say how long a device had nothing to do; ``events`` are those of a trace of torch's."""
    timed = [event for event in events if event.get("ph") == "X"]
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in timed
        if event.get("cat") in LAUNCHES and "correlation" in event["args"]
    }
    work = [event for event in timed if event.get("cat") in WORK]
    if not work:
        work = [event for event in timed if event.get("cat") == "cpu_op"]
    work.sort(key=lambda event: event["ts"])
    start = end = work[0]["ts"]
    idle = for_host = 0.0
    for event in work:
        gap = max(0.0, event["ts"] - end)
        idle += gap
        if launched.get(event.get("args", {}).get("correlation"), event["ts"]) >= end:
            for_host += gap
        end = max(end, event["ts"] + event["dur"])
    return Waiting(end - start, idle, for_host)


def trace(options: argparse.Namespace, length: int) -> dict[str, Any]:
    """Trace a stage whose sub-sequences have ``length`` tokens."""
    model = {"length": length * options.splits, "splits": [options.splits], "chunks": [1]}
    bench = Bench(argparse.Namespace(**vars(options) | model), session, roles=(ROLE,))
    cut = Cut(1, options.splits, "average")
    for _ in range(options.warmup):
        bench.run(cut, ROLE, split=False)
    activities = [ProfilerActivity.CPU]
    if device_name() != "cpu":  # asked for in vain, it takes milliseconds per operator
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        bench.run(cut, ROLE, split=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        text = file.read_text()
    if options.traces:
        options.traces.mkdir(parents=True, exist_ok=True)
        with gzip.open(options.traces / f"{length}.json.gz", "wt") as packed:
            packed.write(text)
    return json.loads(text)


def line(row: dict[str, Any]) -> str:
    """Return the row of the table."""
    return (
        f"| {row['length']} | {row['splits']} | {row['ms']:.2f} | {row['idle']:.1%} | "
        f"{row['waiting_for_host']:.1%} |"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=1, hidden=256)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024], help="tokens of a sub-sequence"
    )
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=3, help="runs before the one that is traced")
    parser.add_argument("--traces", type=Path, help="folder to keep the traces in")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    be_alone()
    rows = []
    for length in options.lengths:
        found = waiting(trace(options, length)["traceEvents"])
        rows.append(
            {
                "length": length,
                "splits": options.splits,
                "ms": found.span / 1e3,
                "idle": found.idle / found.span,
                "waiting_for_host": found.for_host / found.span,
            }
        )
        print(line(rows[-1]), flush=True)
    about = about_model(options)
    if options.output:
        report = table(about, HEADER, map(line, rows))
        save(options.output, about, rows, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
