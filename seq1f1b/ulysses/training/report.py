"""What a run says while it goes: a bar, a line of JSON for each step, TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from seq1f1b.files import number_in, set_aside


class Reporter:
    """Writes on rank 0; every other rank has a ``SilentReporter``.

    metrics.jsonl gets a line for each logged step, the folder tensorboard the same figures. Lines
    of steps that come again, as after a resumption, are moved to metrics.jsonl.replaced.
    """

    def __init__(self, folder: Path, num_steps: int, first_step: int, every: int) -> None:
        self._every = every
        file = folder / "metrics.jsonl"
        set_aside(file, lambda line: number_in(line, "step") <= first_step)
        self._lines = file.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard", first_step + 1)
        self._started = time.perf_counter()
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, figures="")
        self._bar.start()

    def step(self, number: int, figures: dict[str, float]) -> None:
        """Report step ``number``, counted from 1."""
        short = (
            f"loss {figures['loss']:.4f}  norm {figures['grad_norm']:.2f}  "
            f"{figures['tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.update(self._task, completed=number, figures=short)
        if number % self._every:
            return
        self._lines.write(json.dumps({"step": number, **figures}) + "\n")
        self._lines.flush()
        if not self._console.is_terminal:
            self._console.print(f"step {number}  {short}", highlight=False)
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(name, value, number)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False)

    def close(self) -> None:
        """End the bar and the files."""
        self._bar.stop()
        self._lines.close()
        if self._board is not None:
            self._board.close()


class SilentReporter:
    """Says nothing."""

    def step(self, number: int, figures: dict[str, float]) -> None:
        """See Reporter."""

    def say(self, text: str) -> None:
        """See Reporter."""

    def close(self) -> None:
        """See Reporter."""


def _board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step)
