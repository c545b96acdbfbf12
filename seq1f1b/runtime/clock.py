"""When each action of a rank started and ended."""

import time
from typing import Any

import torch

from seq1f1b.schedule import Action, Span


class _HostStamp:
    """A moment on the host, which is where the CPU's computations end."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def seconds_since(self, earlier: "_HostStamp") -> float:
        return self.seconds - earlier.seconds


class _CudaStamp:
    """The moment when the device has done everything issued before it."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def seconds_since(self, earlier: "_CudaStamp") -> float:
        return earlier.event.elapsed_time(self.event) / 1000.0


class ActionClock:
    """Records the computations of one step, on the host or, with ``device`` cuda, by events.

    Reading ``finish`` waits for the device once, after the step.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._on_cuda = device == "cuda"
        self._origin = self._now()
        self._stamps: list[tuple[Action, Any, Any]] = []
        self._started = self._origin

    def begin(self) -> None:
        """A computation starts now."""
        self._started = self._now()

    def end(self, action: Action) -> None:
        """The computation that began last was ``action`` and ends now."""
        self._stamps.append((action, self._started, self._now()))

    def finish(self) -> tuple[list[Span], float]:
        """Return all computations of the step and its whole length in seconds."""
        last = self._now()
        if self._on_cuda:
            torch.cuda.synchronize()
        timed = [
            Span(action, start.seconds_since(self._origin), end.seconds_since(self._origin))
            for action, start, end in self._stamps
        ]
        return timed, last.seconds_since(self._origin)

    def _now(self) -> Any:
        return _CudaStamp() if self._on_cuda else _HostStamp()
