"""Processes that end with the one that started them."""

import contextlib
import ctypes
import os
import signal

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
