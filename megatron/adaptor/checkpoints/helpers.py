"""The processes that help a rank to save: they outlive a signal to end, and never their rank.

torchrun sends SIGTERM to the group of processes of each rank. With ``--exit-signal-handler`` the
rank itself notes it and saves, for which it needs its helpers.
"""

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children, get_context, resource_tracker
from multiprocessing.managers import SyncManager
from multiprocessing.util import Finalize
from typing import Any

from megatron.adaptor.patches import Patch
from seq1f1b.processes import end_with_parent

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
# Python sends daemons SIGTERM at exit, and waits until they have ended.
_BEFORE_DAEMONS = 100


class Helpers:
    """Starts the helpers of this rank, whose arguments ``arguments`` returns."""

    def __init__(self, arguments: Callable[[], argparse.Namespace | None]) -> None:
        self._arguments = arguments

    def patches(self) -> list[Patch]:
        """Return what is replaced where helpers are started."""
        return [
            Patch(
                f"{_STRATEGIES}.filesystem_async:get_write_results_queue",
                self.get_write_results_queue,
            ),
            Patch(
                f"{_STRATEGIES}.async_utils:PersistentAsyncCaller._get_process", self.get_process
            ),
            Patch("megatron.training.global_vars:_set_signal_handler", self.set_signal_handler),
        ]

    def get_write_results_queue(self, original: Callable[..., Any], mp_mode: str = "spawn") -> Any:
        """Keep signals to end from the process that holds the results of writers."""
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=get_context(mp_mode))
            with _held_back(self._signals()):
                manager.start(end_with_parent, (os.getpid(),))
            filesystem_async._results_queue = manager.Queue()
        return original(mp_mode)

    def get_process(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Keep signals to end from the process that saves in the background."""
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        if PersistentAsyncCaller._persistent_process is not None:
            return original(*args, **kwargs)
        loop = PersistentAsyncCaller.async_loop
        # A new process finds what it runs by its name.
        PersistentAsyncCaller.async_loop = staticmethod(save_in_background)
        try:
            with _held_back(self._signals()):
                return original(*args, **kwargs)
        finally:
            PersistentAsyncCaller.async_loop = staticmethod(loop)

    def set_signal_handler(self, original: Callable[..., Any], *args: Any) -> None:
        """End processes at exit that no signal to end ends, for which Python waits for ever."""
        original(*args)
        Finalize(None, end_daemons, exitpriority=_BEFORE_DAEMONS)

    def _signals(self) -> set[int]:
        args = self._arguments()
        return {signal.SIGTERM, args.exit_signal} if args and args.exit_signal_handler else set()


def save_in_background(*args: Any) -> None:
    """What the process of ``--async-save`` runs."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    end_with_parent(os.getppid())
    PersistentAsyncCaller.async_loop(*args)


def end_daemons() -> None:
    """Kill the helpers and the workers that load data, which note a signal to end and go on."""
    for process in active_children():
        if process.daemon:
            process.kill()


@contextmanager
def _held_back(signals: set[int]) -> Iterator[None]:
    """Hold ``signals`` back; processes that are started in the block never get them.

    This process gets those that came meanwhile when the block ends.
    """
    resource_tracker.ensure_running()  # its start would let them through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
