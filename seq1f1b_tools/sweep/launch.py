"""Start runs, wait for them, and end each whole if it has to be ended."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seq1f1b_tools.sweep.failures import explain

_TICK_SECONDS = 0.25
# torchrun itself gives its workers 30 seconds
_SECONDS_TO_END = 40


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ok, oom, failed or timeout, and the error in one line."""

    status: str
    error: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """A command to run, with its output in ``log``.

    alarm: called several times a second; once it returns a reason, the run is ended as failed for
    that reason.
    ended: called when the run has ended, however it did.
    """

    command: list[str]
    log: Path
    environment: Mapping[str, str]
    alarm: Callable[[], str | None]
    ended: Callable[[], None] = lambda: None


def launch(jobs: Sequence[Job], timeout: float, tick: Callable[[float], None]) -> list[Outcome]:
    """Run all ``jobs`` at the same time and return how each of them ended.

    ``tick`` is called with the seconds so far, several times a second. Interrupts end all runs and
    are passed on.
    """
    start = time.monotonic()
    outcomes: dict[int, Outcome] = {}
    processes: list[subprocess.Popen] = []
    try:
        processes += map(_start, jobs)
        while len(outcomes) < len(jobs):
            time.sleep(_TICK_SECONDS)
            seconds = time.monotonic() - start
            for number, (job, process) in enumerate(zip(jobs, processes, strict=True)):
                if number in outcomes:
                    continue
                ending = _ending(job, process, seconds, timeout)
                if ending is not None:
                    outcomes[number] = Outcome(*ending, seconds)
                    job.ended()
            tick(seconds)
    finally:
        _end(processes)
    return [outcomes[number] for number in range(len(jobs))]


def _start(job: Job) -> subprocess.Popen:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as stream:
        stream.write(f"$ {shlex.join(job.command)}\n")
        stream.flush()
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(job.environment),
            start_new_session=True,
        )


def _ending(
    job: Job, process: subprocess.Popen, seconds: float, timeout: float
) -> tuple[str, str] | None:
    """Return status and error of a run that has ended, or that is ended here; None if it runs."""
    if process.poll() is not None:
        return explain(job.log, process.returncode) if process.returncode else ("ok", "")
    if seconds > timeout:
        _end([process])
        return "timeout", f"ended after {timeout:g} seconds (RUN_TIMEOUT)"
    if reason := job.alarm():
        _end([process])
        return "failed", reason
    return None


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes, and what they started: torchrun puts each worker in a session of its own."""
    running = [process for process in processes if process.poll() is None]
    family = {pid: _started(pid) for process in running for pid in _descendants(process.pid)}
    for process in running:
        process.terminate()
    deadline = time.monotonic() + _SECONDS_TO_END
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
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
