"""Start one run, wait for it, and end it whole if it has to be ended."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.sweep.failures import explain

_TICK_SECONDS = 0.25
# torchrun itself gives its workers 30 seconds
_SECONDS_TO_END = 40


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ok, oom, failed or timeout, and the error in one line."""

    status: str
    error: str
    seconds: float


def launch(
    command: list[str],
    log: Path,
    environment: Mapping[str, str],
    timeout: float,
    *,
    tick: Callable[[float], str | None],
) -> Outcome:
    """Run ``command`` with its output in ``log``.

    ``tick`` is called with the seconds so far, several times a second; once it returns a reason,
    the run is ended as failed for that reason. Interrupts end the run and are passed on.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as stream:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            stopped = _wait(process, start, timeout, tick)
        finally:
            _end(process)
    seconds = time.monotonic() - start
    if stopped is not None:
        return Outcome(*stopped, seconds)
    if process.returncode:
        return Outcome(*explain(log, process.returncode), seconds)
    return Outcome("ok", "", seconds)


def _wait(
    process: subprocess.Popen, start: float, timeout: float, tick: Callable[[float], str | None]
) -> tuple[str, str] | None:
    """Wait for the end; returns status and error of a run that has to be ended."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TICK_SECONDS)
            return None
        seconds = time.monotonic() - start
        if seconds > timeout:
            return "timeout", f"ended after RUN_TIMEOUT={timeout:g} seconds"
        if reason := tick(seconds):
            return "failed", reason


def _end(process: subprocess.Popen) -> None:
    """End the process, and what it started: torchrun puts each worker in a session of its own."""
    if process.poll() is not None:
        return
    family = {pid: _started(pid) for pid in _descendants(process.pid)}
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    process.kill()
    process.wait()
    for pid, started in family.items():
        # a number may have gone to another process meanwhile
        if started is not None and _started(pid) == started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started, directly or not (Linux; empty elsewhere)."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _started(pid: int) -> str | None:
    """Return the time at which a process was started, in the kernel's ticks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
