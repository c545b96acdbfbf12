"""How far a run is: a bar on a terminal, lines in a log."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_MEGABYTE = 1e6


class ProgressReport:
    """Documents, MB/s of JSON text and the time left, on stderr.

    On a terminal a bar; elsewhere one line each time another `log_interval` documents are done.
    The time left comes from the share of the input files that has been read; `total_bytes` is 0
    where that is not known, as of pipes.
    """

    def __init__(self, total_bytes: int, log_interval: int) -> None:
        self.num_documents = 0
        self.num_bytes = 0
        self._total = total_bytes
        self._interval = log_interval
        self._start = time.monotonic()
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[documents]:,} documents"),
            TextColumn("{task.fields[speed]:.1f} MB/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            refresh_per_second=4,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=self._total or None, documents=0, speed=0.0)

    @property
    def seconds(self) -> float:
        """Since the first document was asked for."""
        return time.monotonic() - self._start

    @property
    def speed(self) -> float:
        """MB of JSON text a second."""
        return self.num_bytes / _MEGABYTE / max(self.seconds, 1e-9)

    def advance(self, num_documents: int, num_bytes: int, position: int) -> None:
        """Count a finished batch; `position` is in bytes of the files as they lie on disk."""
        intervals_before = self.num_documents // self._interval
        self.num_documents += num_documents
        self.num_bytes += num_bytes
        self._bar.update(
            self._task, completed=position, documents=self.num_documents, speed=self.speed
        )
        if self._bar.disable and self.num_documents // self._interval > intervals_before:
            print(
                f"processed {self.num_documents:,} documents "
                f"({self.num_documents / self.seconds:,.0f} documents/s, {self.speed:.1f} MB/s"
                f"{self._left(position)})",
                file=sys.stderr,
            )

    def _left(self, position: int) -> str:
        if not self._total or not position:
            return ""
        seconds = self.seconds * max(self._total - position, 0) / position
        return f", {timedelta(seconds=round(seconds))} left"

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
