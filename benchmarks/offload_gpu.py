"""Model chunks in host memory beside a GPU: what is trained, step time and memory of the device.

    python benchmarks/offload_gpu.py --traces TRACES --output benchmarks/results/gpu/offload

Trains the same model from the same seed with all chunks on the device and with some of them there,
each in processes of its own, in turn (A B C, B C A ...). The stages share a device, and their
tensors go through host memory: times tell what a contender costs beside the others, not what it
takes on several GPUs. With chunks in host memory Adam runs there, and rounds otherwise than on a
GPU: losses and weights of those contenders are compared bit for bit with one another, and losses
with the resident ones by how far they are apart. Traces show copies beside kernels.
"""

import argparse
import hashlib
import re
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from one_gpu import about_training, add_training_arguments, train
from report import show, table
from turns import in_turn

PEAK = re.compile(r"\[Rank (\d+)\] .* max allocated: ([\d.]+)")
HEADER = "| chunks on the device | s/step | tokens/s | peak MiB by stage | loads by stage |"


def contenders(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the flags of each way to train, by name; the first keeps all chunks."""
    offload, slots = ["--offload-model-chunks"], str(options.slots)
    return {
        "all": [],
        f"{options.chunks} in slots, Adam on the host": [*offload, str(options.chunks)],
        f"{slots}": [*offload, slots],
        f"{slots}, prefetched": [*offload, slots, "--offload-prefetch"],
        f"{slots}, prefetched, just-in-time Adam": [
            *offload,
            slots,
            "--offload-prefetch",
            "--offload-just-in-time-updates",
        ],
    }


def run(options: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """Train once and return losses, weights, times and memory."""
    with tempfile.TemporaryDirectory() as folder:
        save = (
            *("--save", folder, "--save-interval", str(options.iterations)),
            *("--no-save-optim", "--no-save-rng", "--ckpt-format", "torch"),
        )
        trained = train(options, options.stages, 1, flags=[*_common(options), *save, *flags])
        weights = _hash(Path(folder))
    peaks: dict[str, float] = {}
    for rank, mib in PEAK.findall(trained.output):
        peaks[rank] = max(peaks.get(rank, 0.0), float(mib))
    return {
        "losses": [entry["lm_loss"] for entry in trained.entries],
        "weights": weights,
        "seconds": [entry["milliseconds"] / 1e3 for entry in trained.entries[1:]],
        "peak_mib": [peaks[rank] for rank in sorted(peaks, key=int)],
        "loads": trained.entries[-1]["chunk_loads"] or [0] * options.stages,
    }


def trace(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """Train once more, and leave rank 0's profile of a step in the folder of traces."""
    with tempfile.TemporaryDirectory() as folder:
        profile = (
            *("--profile", "--use-pytorch-profiler", "--profile-ranks", "0"),
            *("--profile-step-start", "1", "--profile-step-end", "2"),
            *("--tensorboard-dir", f"{folder}/tensorboard"),
        )
        train(options, options.stages, 1, flags=[*_common(options), *profile, *flags])
        options.traces.mkdir(parents=True, exist_ok=True)
        made = Path(folder) / "torch_profile" / "rank-0.json.gz"
        shutil.move(made, options.traces / "offload-rank-0.json.gz")


def _common(options: argparse.Namespace) -> list[str]:
    return [
        *("--num-virtual-stages-per-pipeline-rank", str(options.chunks)),
        *("--use-distributed-optimizer", "--seq1f1b-schedule", "1f1b"),
        *("--seq1f1b-turn", str(options.micro_batches)),
    ]


def _hash(folder: Path) -> str:
    """Return a digest of all weights in a checkpoint, rank by rank and chunk by chunk."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("iter_*/*/*.pt")):
        saved = torch.load(file, map_location="cpu", weights_only=False)
        for chunk in sorted(key for key in saved if key.startswith("model")):
            for name, tensor in saved[chunk].items():
                if isinstance(tensor, torch.Tensor):
                    digest.update(f"{file.parent.name} {chunk} {name}".encode())
                    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Alternate all contenders and return a row for each."""
    field = contenders(options)
    names, runs = list(field), {name: list[dict[str, Any]]() for name in field}
    for _, name in in_turn(names, options.rounds):
        runs[name].append(run(options, field[name]))
    resident, *offloaded = (runs[name][0] for name in names)
    rows = []
    for name in names:
        seconds = statistics.median(s for each in runs[name] for s in each["seconds"])
        one = runs[name][0]
        rows.append(
            {
                "contender": name,
                "seconds_median": seconds,
                "tokens_per_second": options.micro_batches * options.length / seconds,
                "peak_mib": one["peak_mib"],
                "loads": one["loads"],
                "losses": one["losses"],
                "weights": one["weights"],
                "equals_others_on_the_host": name == names[0]
                or all(
                    (each["losses"], each["weights"])
                    == (offloaded[0]["losses"], offloaded[0]["weights"])
                    for each in runs[name]
                ),
                "worst_relative_loss_difference": max(
                    abs(b / a - 1) for a, b in zip(resident["losses"], one["losses"], strict=True)
                ),
            }
        )
    return rows


def verdict(rows: list[dict[str, Any]]) -> str:
    """Return what the table says first: whether what is trained is the same."""
    differing = [row["contender"] for row in rows if not row["equals_others_on_the_host"]]
    worst = max(row["worst_relative_loss_difference"] for row in rows)
    same = f"DIFFER with {'; '.join(differing)}" if differing else "are the same bit for bit"
    return (
        f"With Adam on the host, losses and weights {same}; losses are at most {worst:.1e} from "
        "those of resident chunks."
    )


def line(row: dict[str, Any]) -> str:
    """Return the row of the table."""
    peaks = ", ".join(f"{mib:.0f}" for mib in row["peak_mib"])
    loads = ", ".join(map(str, row["loads"]))
    return (
        f"| {row['contender']} | {row['seconds_median']:.3f} | {row['tokens_per_second']:.0f} | "
        f"{peaks} | {loads} |"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=4, help="model chunks of a stage")
    parser.add_argument("--slots", type=int, default=2, help="--offload-model-chunks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--traces", type=Path, help="folder for a profile of the last contender")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    rows = compare(options)
    about = about_training(options)
    report = table(about, f"{verdict(rows)}\n\n{HEADER}\n|{'---|' * 5}", map(line, rows))
    show(report, options.output, about, rows)
    if options.traces:
        trace(options, list(contenders(options).values())[-1])


if __name__ == "__main__":
    main()
