"""What the allocator holds beyond what is used, with and without expandable segments.

    python benchmarks/segments.py --output benchmarks/results/gpu/segments

Sub-sequences of different lengths leave pieces of different sizes behind, and what torch's
allocator cannot put together is lost. Trains under 1F1B and under Seq1F1B with both balances, in
processes that share the device, each with ``expandable_segments`` off and on.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from one_gpu import about_training, add_training_arguments, train
from report import show, table

MIB = re.compile(r"\[Rank 0\] .* max allocated: ([\d.]+) .* max reserved: ([\d.]+)")
HEADER = """\
First stage, MiB; what is lost is what the allocator holds beyond the most that was ever used.

| s | balance | expandable segments | most allocated | most reserved | lost |
|---|---|---|---|---|---|"""


def measure(options: argparse.Namespace, splits: int, balance: str, switch: bool) -> dict[str, Any]:
    """Return a row for one way to train."""
    environment = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{switch}"}
    run = train(options, options.stages, splits, balance=balance, environment=environment)
    found = [tuple(map(float, pair)) for pair in MIB.findall(run.output)]
    allocated, reserved = (max(values) for values in zip(*found, strict=True))
    return {
        "splits": splits,
        "balance": balance if splits > 1 else None,
        "expandable_segments": switch,
        "allocated_mib": allocated,
        "reserved_mib": reserved,
        "lost": reserved / allocated - 1,
    }


def line(row: dict[str, Any]) -> str:
    """Return the row of the table."""
    return (
        f"| {row['splits']} | {row['balance'] or '-'} | "
        f"{'on' if row['expandable_segments'] else 'off'} | {row['allocated_mib']:.0f} | "
        f"{row['reserved_mib']:.0f} | {row['lost']:.1%} |"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_training_arguments(parser)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument(
        "--cuts",
        nargs="+",
        default=["1", "4:average", "4:uniform_comp"],
        help="numbers of sub-sequences, with how they are balanced",
    )
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    rows = [
        measure(options, int(splits), balance or "average", switch)
        for splits, _, balance in (cut.partition(":") for cut in options.cuts)
        for switch in (False, True)
    ]
    about = about_training(options)
    report = table(about, HEADER, map(line, rows))
    show(report, options.output, about, rows)


if __name__ == "__main__":
    main()
