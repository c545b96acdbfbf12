"""Ctrl-C and termination requests as an exception, so that cleaning up has one path."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """The process was asked to end; `exit_code` is 128 plus the signal's number, as in a shell."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


def ignore_interrupts() -> None:
    """Let what follows (cleaning up, or publishing) run to its end."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave_interrupts_to_parent() -> None:
    """In a worker process: Ctrl-C reaches the whole group, and the parent ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_interrupted(number: int, _frame: FrameType | None) -> None:
    ignore_interrupts()
    raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the block on SIGINT, SIGTERM and SIGHUP.

    A signal that the starter had ignored (nohup, a background job) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise_interrupted)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
