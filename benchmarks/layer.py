"""What cutting costs one transformer layer: forward and backward of its sub-sequences over a whole.

    python benchmarks/layer.py --hidden-size 4096 --heads 32 --lengths 8192 32768 --dtype bfloat16

The layer of a middle stage under our executor, alone on the device, all cuts in turn; of each the
fastest run counts. Memory is what is allocated after the forwards of one micro-batch, including the
KV carry and the gradients of keys and values.
"""

# ruff: noqa: E402

import argparse
from pathlib import Path
from typing import Any

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from alone import Bench, be_alone
from gpt import about_model, add_model_arguments
from report import save, table

MIB = 2**20
HEADER = """\
| tokens | s | balance | ms | over whole | MiB | over whole |
|---|---|---|---|---|---|---|"""


def measure(options: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """Return a row for every cut of a sequence of ``length`` tokens; the whole is the first."""
    options = argparse.Namespace(**vars(options) | {"length": length, "chunks": [1]})
    bench = Bench(options, session, roles=("middle",))
    bench.time_all()
    rows: list[dict[str, Any]] = []
    for cut in bench.cuts:
        memory = bench.memory(cut, "middle")
        seconds = bench.seconds(cut, "middle")
        num_bytes = sum(memory.activation) + memory.carry + memory.accumulator
        whole = rows[0] if rows else {"seconds": seconds, "bytes": num_bytes}
        rows.append(
            {
                "length": length,
                "splits": cut.num_splits,
                "balance": cut.balance if cut.num_splits > 1 else None,
                "seconds": seconds,
                "over_whole": seconds / whole["seconds"],
                "bytes": num_bytes,
                "bytes_over_whole": num_bytes / whole["bytes"],
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """Return the row of the table."""
    return (
        f"| {row['length']} | {row['splits']} | {row['balance'] or '-'} | "
        f"{row['seconds'] * 1e3:.2f} | {row['over_whole']:.3f} | "
        f"{row['bytes'] / MIB:.1f} | {row['bytes_over_whole']:.3f} |"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser, layers=1, hidden=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    be_alone()
    rows = []
    for length in options.lengths:
        measured = measure(options, length)
        print(*map(line, measured), sep="\n", flush=True)
        rows += measured
    about = about_model(options, rounds=options.rounds)
    if options.output:
        report = table(about, HEADER, map(line, rows))
        save(options.output, about, rows, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
