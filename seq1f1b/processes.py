"""How processes end: with the one that started them, or at once when their work is done."""

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Let Linux send this process a signal when the one that started it ends, in whatever way.

    ``parent`` is that process's number: where it has ended before it was watched, this one exits
    with status 1. None if that cannot be.
    """
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent not in (None, os.getppid()):
        os._exit(1)


def end_with_starter() -> None:
    """Kill this process of multiprocessing when the one that started it ends, in whatever way.

    Also where that one is not its parent, but asked a server for a fork.
    """
    starter = parent_process()
    if starter is None:
        raise RuntimeError("this process was not started by multiprocessing")

    def watch() -> None:
        wait([starter.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def ending(code: int) -> str:
    """Return how a process ended, by the exit code that Python has of it."""
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def end_now(status: int) -> NoReturn:
    """End this process with everything that was printed, but without the interpreter's shutdown.

    For ranks that are done: threads of process groups outlive the groups, and one of them may abort
    the process while the interpreter goes, which makes a failure of a job that succeeded.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
