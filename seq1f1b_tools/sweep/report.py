"""The results as a table on the terminal and as a CSV file."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

from seq1f1b.files import replacing
from seq1f1b_tools.sweep.factors import Factors, factors
from seq1f1b_tools.sweep.plan import Run
from seq1f1b_tools.sweep.records import Summary, largest_loss_difference, speedup


@dataclass(frozen=True)
class Result:
    """One run of the plan with what is known of it.

    status: ok, oom, failed, timeout, skipped, or "not run" where the sweep did not get to it.
    baseline: the summary of the 1F1B of the same settings, if there is one.
    """

    run: Run
    status: str
    error: str = ""
    seconds: float | None = None
    summary: Summary | None = None
    baseline: Summary | None = None

    @property
    def speedup(self) -> float | None:
        """How much faster than 1F1B a step is."""
        if self.summary is None or self.baseline is None:
            return None
        return speedup(self.summary.steps, self.baseline.steps)

    @cached_property
    def factors(self) -> Factors | None:
        """What the speedup is made of."""
        if self.summary is None or self.baseline is None or self.speedup is None:
            return None
        return factors(self.run, self.summary, self.baseline, self.speedup)

    @property
    def loss_difference(self) -> float | None:
        """The largest relative difference of the loss to 1F1B's, over all iterations."""
        if self.summary is None or self.baseline is None:
            return None
        return largest_loss_difference(self.summary.losses, self.baseline.losses)

    def row(self) -> dict[str, object]:
        """Return the line of the CSV file; a list has one number per stage."""
        run, summary = self.run, self.summary
        measured: dict[str, object] = {}
        parts = self.factors
        if summary is not None:
            measured = {
                "ms_per_iteration": f"{summary.milliseconds:.2f}",
                "tokens_per_second": f"{summary.tokens_per_second:.1f}",
                "tflops_per_device": f"{summary.tflops_per_device:.4f}",
                "speedup": _optional(self.speedup, ".4f"),
                "speedup_ends": _optional(parts.ends if parts else None, ".4f"),
                "speedup_splitting": _optional(parts.splitting if parts else None, ".4f"),
                "speedup_executor": _optional(parts.executor if parts else None, ".4f"),
                "peak_memory_mib": " ".join(f"{mib:.2f}" for mib in summary.peak_memory_mib),
                "kv_carry_mib": " ".join(f"{mib:.2f}" for mib in summary.kv_carry_mib),
                "bubble_ratio": f"{summary.bubble_ratio:.4f}",
                "last_loss": _optional(summary.last_loss, ".6f"),
                "max_loss_difference": _optional(self.loss_difference, ".2e"),
            }
        return {
            "name": run.name,
            "status": self.status,
            "schedule": run.schedule,
            "splits": run.num_splits,
            "balance": run.balance_method or "",
            "model": run.model.name,
            "p": run.pp,
            "v": run.num_chunks,
            "tp": run.tp,
            "m": run.num_micro_batches,
            "s": run.num_splits,
            "seq": run.seq_length,
            "micro_batch_size": run.micro_batch_size,
            "processes": run.num_processes,
            "iterations": run.num_iterations,
            "ms_per_iteration": "",
            "tokens_per_second": "",
            "tflops_per_device": "",
            "speedup": "",
            "speedup_theory": f"{run.speedup:.4f}",
            "speedup_ends": "",
            "speedup_splitting": "",
            "speedup_executor": "",
            "peak_memory_mib": "",
            "kv_carry_mib": "",
            "bubble_ratio": "",
            "bubble_ratio_theory": f"{run.bubble_ratio:.4f}",
            "last_loss": "",
            "max_loss_difference": "",
            "seconds": _optional(self.seconds, ".1f"),
            "error": self.error,
        } | measured


def write_csv(results: Sequence[Result], file: Path) -> None:
    """Write one row per run, replacing the file whole."""
    rows: list[Mapping[str, object]] = [result.row() for result in results]
    with replacing(file, newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print one table per setting, and why runs are missing from it."""
    for setting in dict.fromkeys(result.run.setting for result in results):
        group = [result for result in results if result.run.setting == setting]
        console.print(_table(setting, group))
        for result in group:
            _print_product(result, console)
            if result.error:
                console.print(f"{result.run.variant}: {result.error}", style="yellow", markup=False)


def _table(setting: str, results: Sequence[Result]) -> Table:
    table = Table(title=setting, title_justify="left")
    table.add_column("schedule", no_wrap=True)
    table.add_column("status")
    for heading in (
        "ms / step",
        "tokens / s",
        "TFLOP/s\nper device",
        "speedup\n(theory)",
        "peak MiB\nby stage",
        "bubble\n(theory)",
        "last loss",
        "loss vs\n1F1B",
    ):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(*_cells(result), style=None if result.summary else "dim")
    return table


def _cells(result: Result) -> list[str]:
    run, summary = result.run, result.summary
    cells = [run.variant, result.status]
    if summary is None:
        return cells
    return [
        *cells,
        f"{summary.milliseconds:,.1f}",
        f"{summary.tokens_per_second:,.0f}",
        f"{summary.tflops_per_device:.3f}",
        f"{_optional(result.speedup, '.3f') or '-'} ({run.speedup:.3f})",
        ", ".join(f"{mib:,.0f}" for mib in summary.peak_memory_mib),
        f"{summary.bubble_ratio:.3f} ({run.bubble_ratio:.3f})",
        _optional(summary.last_loss, ".4f") or "-",
        _optional(result.loss_difference, ".1e") or "-",
    ]


def _print_product(result: Result, console: Console) -> None:
    parts = result.factors
    if parts is None or result.run.is_baseline:
        return
    product = " x ".join(f"{factor:.3f} ({name})" for name, factor in vars(parts).items())
    console.print(f"{result.run.variant}: {result.speedup:.3f} = {product}", highlight=False)


def _optional(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
