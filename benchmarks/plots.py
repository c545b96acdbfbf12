"""Pictures of tables that other benchmarks have stored.

    python benchmarks/plots.py benchmarks/results/replay.json --output docs/images

Draws NAME.png for each NAME.json: of attention.py and layer.py the time over one whole call, of
replay.py the speedup over 1F1B beside what theory allows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import sentence

Rows = list[dict[str, Any]]


def over_whole(rows: Rows, title: str) -> plt.Figure:
    """Draw a line for each kernel or balance and number of splits, over the length."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["splits"] > 1:
            name = f"{row.get('kernel') or row['balance']}, s={row['splits']}"
            lines.setdefault(name, []).append((row["length"], row["over_whole"]))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("forward and backward, over one whole call")
    axes.legend(fontsize="small")
    figure.suptitle(title, fontsize=7, wrap=True)
    return figure


def speedups(rows: Rows, title: str) -> plt.Figure:
    """Draw a bar for each schedule at its best cut, per shape, and a mark where theory is."""
    shapes = sorted({(row["stages"], row["micro_batches"]) for row in rows})
    figure, grid = plt.subplots(
        1, len(shapes), figsize=(3.2 * len(shapes), 4.2), sharex=True, sharey=True, squeeze=False
    )
    figure.set_layout_engine("constrained")
    # in the table's order from the top down, which begins with 1F1B
    names = list(dict.fromkeys(_name(row) for row in sorted(rows, key=_order)))
    scale = max(max(row["speedup"], row.get("speedup_in_theory", 0.0)) for row in rows)
    for axes, (stages, m) in zip(grid[0], shapes, strict=True):
        best: dict[str, dict[str, Any]] = {}
        for row in rows:
            is_here = (row["stages"], row["micro_batches"]) == (stages, m)
            if is_here and row["speedup"] > best.get(_name(row), {"speedup": 0.0})["speedup"]:
                best[_name(row)] = row
        values = [best[name]["speedup"] for name in names]
        colours = ["#8c8c8c" if name == names[0] else "#4477aa" for name in names]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(
            bars,
            [f"{value:.2f}" for value in values],
            label_type="center",
            color="white",
            fontsize=7,
            fontweight="bold",
        )
        axes.set_xlim(0, scale * 1.05)
        for place, name in enumerate(names):
            if "speedup_in_theory" in best[name]:
                theory = best[name]["speedup_in_theory"]
                axes.plot([theory, theory], [place - 0.4, place + 0.4], color="#ee6677")
        axes.set_title(f"p={stages}, m={m}", fontsize="small")
        axes.tick_params(labelsize=7)
        axes.set_xlabel("speedup over 1F1B; line: theory", fontsize=7)
    grid[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=7, wrap=True)
    return figure


def _order(row: dict[str, Any]) -> tuple[bool, bool, int]:
    """Sort 1F1B first, then its kin, then what cuts into sub-sequences, each by model chunks."""
    name = row["schedule"]
    return "seq1f1b" in name or name == "greedy", name == "greedy", row["chunks"]


def _name(row: dict[str, Any]) -> str:
    return row["schedule"] if row["chunks"] == 1 else f"{row['schedule']}, v={row['chunks']}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path, nargs="+", metavar="NAME.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for table in options.tables:
        document = json.loads(table.read_text())
        rows, title = document["rows"], sentence(document["setting"])
        if "over_whole" in rows[0]:
            figure = over_whole(rows, title)
        elif "stages" in rows[0] and "speedup" in rows[0]:
            figure = speedups(rows, title)
        else:
            parser.error(f"{table}: of neither attention.py, layer.py nor replay.py")
        file = options.output / f"{table.stem}.png"
        figure.savefig(file, dpi=110)
        plt.close(figure)
        print(f"written: {file}")


if __name__ == "__main__":
    main()
