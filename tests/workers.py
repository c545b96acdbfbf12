"""Worker ranks that stay alive from test to test."""

import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seq1f1b.processes import end_with_starter
from tests.forks import MegatronFork

_CONTEXT = get_context("forkserver")


class WorkerError(AssertionError):
    """A rank raised or hung; the message carries its traceback."""


class WorkerPool:
    """``size`` processes joined over gloo, each with one thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 200.0) -> list[Any]:
        """Call ``function(*args)`` on every rank and return their results in rank order.

        Raises WorkerError with the traceback of the first rank that fails, or when one has not
        answered after ``timeout`` seconds; either way the processes are replaced.
        """
        self._start()
        for inbox in self._inboxes:
            inbox.put((function, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.size:
            try:
                rank, failure, result = self._outbox.get(timeout=0.2)
            except queue.Empty:
                dead = [rank for rank, p in enumerate(self._processes) if not p.is_alive()]
                late = [rank for rank in range(self.size) if rank not in results]
                if dead or time.monotonic() > deadline:
                    self.close()
                    what = f"ranks {dead} died" if dead else f"ranks {late} gave no answer in time"
                    raise WorkerError(f"{function.__qualname__}: {what}") from None
                continue
            if failure:
                self.close()
                raise WorkerError(f"{function.__qualname__} on rank {rank}:\n{failure}")
            results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        if self._processes:
            return
        self._outbox = _CONTEXT.Queue()
        self._inboxes = [_CONTEXT.Queue() for _ in range(self.size)]
        store = Path(tempfile.mkdtemp()) / "store"
        self._processes = [
            MegatronFork(
                target=_serve,
                args=(rank, self.size, str(store), inbox, self._outbox),
                daemon=True,
            )
            for rank, inbox in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()


def _serve(rank: int, size: int, store: str, inbox: Any, outbox: Any) -> None:
    end_with_starter()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    while True:
        function, args = inbox.get()
        try:
            outbox.put((rank, None, function(*args)))
        except BaseException:
            outbox.put((rank, traceback.format_exc(), None))
