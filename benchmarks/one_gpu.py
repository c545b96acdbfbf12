"""Several pipeline stages on one device: losses and memory of Seq1F1B beside 1F1B's.

    python benchmarks/one_gpu.py --stages 2 4 --output benchmarks/results/gpu/one_gpu

Trains the same model from the same seed in Megatron's own loop and in Seq1F1B, in processes that
share a device; their tensors go through host memory. Speed means nothing here: stages wait for each
other's kernels.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import device_name, setting, show, table

from seq1f1b.schedule import interleaved, one_f_one_b, peak_live

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Training:
    """What a training run left: its printed lines, and an entry for each iteration."""

    output: str
    entries: list[dict[str, Any]]


def train(
    options: argparse.Namespace,
    num_stages: int,
    splits: int,
    *,
    balance: str = "uniform_comp",
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Training:
    """Train in ``num_stages`` processes on the device.

    flags: more of them. environment: what is added to that of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        precision = "--bf16" if options.dtype == "bfloat16" else ""
        arguments = shlex.split(
            f"--nproc-per-node {num_stages} pretrain_gpt.py {precision} --mock-data "
            f"--distributed-backend gloo --pipeline-model-parallel-size {num_stages} "
            f"--num-layers {options.layers} --hidden-size {options.hidden_size} "
            f"--num-attention-heads {options.heads} --seq-length {options.length} "
            f"--max-position-embeddings {options.length} --position-embedding-type rope "
            f"--micro-batch-size 1 --global-batch-size {options.micro_batches} "
            f"--train-iters {options.iterations} --lr 1e-4 --attention-dropout 0 "
            "--hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 1000 "
            "--transformer-impl local --eval-iters 1 --eval-interval 1000000 --log-interval 1 "
            f"--log-memory-interval 1 --seq1f1b-splits {splits} "
            f"--seq1f1b-balance-method {balance} --seq1f1b-metrics-file {metrics}"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [*arguments, *flags]
        run = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{run.stderr[-4000:]}")
        return Training(run.stdout, [json.loads(line) for line in metrics.read_text().splitlines()])


def compare(options: argparse.Namespace, num_stages: int) -> dict[str, Any]:
    """Return a row for ``num_stages``."""
    whole, cut = (train(options, num_stages, s).entries for s in (1, options.splits))
    peaks = [
        statistics.median(entry["peak_activation_bytes"][0] for entry in run)
        for run in (whole, cut)
    ]
    m, s = options.micro_batches, options.splits
    plans = one_f_one_b(num_stages, m), interleaved(num_stages, 1, m, s)
    live = [peak_live(plan)[0] / plan.num_splits for plan in plans]
    return {
        "stages": num_stages,
        "splits": s,
        "worst_relative_loss_difference": max(
            abs(b["lm_loss"] / a["lm_loss"] - 1) for a, b in zip(whole, cut, strict=True)
        ),
        "first_stage_memory_over_1f1b": peaks[1] / peaks[0],
        "in_theory_without_carry": live[1] / live[0],
        "carry_over_1f1b": cut[-1]["kv_carry_bytes"][0] / peaks[0],
    }


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is trained."""
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=2048 if has_gpu else 64)
    parser.add_argument("--heads", type=int, default=16 if has_gpu else 2)
    parser.add_argument("--length", type=int, default=16384 if has_gpu else 256)
    parser.add_argument("--dtype", default="bfloat16" if has_gpu else "float32")


def about_training(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was trained, where and with what."""
    return setting(
        layers=options.layers,
        hidden=options.hidden_size,
        tokens=options.length,
        micro_batches=options.micro_batches,
        iterations=options.iterations,
        dtype=options.dtype,
        device=device_name(),
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    rows = [compare(options, num_stages) for num_stages in options.stages]
    about = about_training(options)
    lines = [
        f"| {row['stages']} | {row['splits']} | {row['worst_relative_loss_difference']:.1e} | "
        f"{row['first_stage_memory_over_1f1b']:.3f} | {row['in_theory_without_carry']:.3f} | "
        f"{row['carry_over_1f1b']:.3f} |"
        for row in rows
    ]
    header = (
        "First stage's activation memory over 1F1B's: measured with the carry, in theory without.\n"
        "\n| stages | s | worst loss difference | measured | theory | carry |\n|" + "---|" * 6
    )
    report = table(about, header, lines)
    show(report, options.output, about, rows)


if __name__ == "__main__":
    main()
