"""Runs one case and sees what it does: how it ends, what it says, and where it writes."""

import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 30
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
)
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile")


class Fault(AssertionError):
    """A case that did what none may do."""


@dataclass
class Watch:
    """What the interpreter's audit events say of the running case."""

    folder: Path | None = None
    faults: list[str] = field(default_factory=list)
    allowed: tuple[str, ...] = ()

    def install(self, allowed: tuple[Path, ...]) -> None:
        """Watch from now on; writing is allowed below ``allowed`` and the case's folder."""
        self.allowed = tuple(str(path) for path in allowed)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _STARTS:
            self.faults.append(f"starts a program: {event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if flags & _WRITING:
                self._wrote(arguments[0])
        elif event in _CHANGES:
            for argument in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(argument, str | bytes | os.PathLike):
                    self._wrote(argument)

    def _wrote(self, path: Any) -> None:
        absolute = os.path.abspath(os.fsdecode(path))
        roots = (str(self.folder), *self.allowed)
        if not absolute.startswith(tuple(f"{root}/" for root in roots)) and absolute not in roots:
            self.faults.append(f"writes outside of its folder: {absolute}")


WATCH = Watch()


@dataclass
class Ended:
    """How a call ended: its status, or the exception that came out of it, and what it printed."""

    status: Any
    out: str
    err: str


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Fault(f"takes longer than {SECONDS} s")


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Watch the block; raises Fault for a hang or for what is done outside of ``folder``."""
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    WATCH.folder, WATCH.faults[:] = folder, []
    try:
        yield
    finally:
        WATCH.folder = None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if WATCH.faults:
        raise Fault("; ".join(dict.fromkeys(WATCH.faults)))


def call(function: Callable[[], Any]) -> Ended:
    """Call a tool as its process would; anything but SystemExit that comes out of it is a Fault."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = function()
    except SystemExit as error:
        status = error.code
    except Fault:
        raise
    except BaseException:
        raise Fault(f"a traceback:\n{traceback.format_exc()}") from None
    if "Traceback (most recent call last)" in out.getvalue() + err.getvalue():
        raise Fault(f"a traceback:\n{out.getvalue()}{err.getvalue()}")
    return Ended(status, out.getvalue(), err.getvalue())


def expect(truth: bool, complaint: str) -> None:
    """Raise Fault unless ``truth``."""
    if not truth:
        raise Fault(complaint)


def scratch() -> Path:
    """Return a new folder for one run of the fuzz."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))
