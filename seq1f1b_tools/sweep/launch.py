"""Start runs, wait for them, end each whole if need be, and find in its log why it failed."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seq1f1b_tools.sweep.plan import TYING_SCRIPT
from seq1f1b_tools.sweep.tied import PARENT_VARIABLE

_TICK_SECONDS = 0.25
# torchrun itself gives its workers 30 seconds
_SECONDS_TO_END = 40
_TAIL_BYTES = 1 << 20
_MAX_LENGTH = 400
_RANK = re.compile(r"^\[rank\d+\]:\s?")
_ERROR = re.compile(
    r"^(?:[\w.]*(?:Error|Exception|Interrupt|Exit|Violation)\b(?::|$)|[\w./-]+: error: ).*"
)
_LIST_ITEM = re.compile(r"^\s+- ")
# what other ranks report when one has gone
_CONSEQUENCE = re.compile(
    r"ChildFailedError|SignalException|Connection (?:closed|reset|refused)|Broken pipe"
    r"|remote process exited|recvValue failed|Watchdog caught collective",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|DefaultCPUAllocator: (?:can't|not enough)"
    r"|\bMemoryError\b|std::bad_alloc|Cannot allocate memory",
    re.IGNORECASE,
)
_KILLED = re.compile(r"exitcode\s*:\s*-9\b|Signal 9 \(SIGKILL\)")


Status = Literal["ok", "oom", "failed", "timeout"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and the error in one line."""

    status: Status
    error: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """A command to run, with its output in ``log``.

    held: open files that the command keeps open, such as a lock.

    alarm: called several times a second; once it returns a reason, the run is ended as failed for
    that reason.
    ended: called when the run has ended, however it did.
    """

    command: list[str]
    log: Path
    environment: Mapping[str, str]
    alarm: Callable[[], str | None]
    held: tuple[int, ...] = ()
    ended: Callable[[], None] = lambda: None


def launch(jobs: Sequence[Job], timeout: float, tick: Callable[[float], None]) -> list[Outcome]:
    """Run all ``jobs`` at the same time and return how each of them ended.

    ``tick`` is called with the seconds so far, several times a second. Interrupts end all runs and
    are passed on.
    """
    start = time.monotonic()
    outcomes: dict[int, Outcome] = {}
    processes: list[subprocess.Popen[bytes]] = []
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


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as stream:
        stream.write(f"$ {shlex.join(job.command)}\n")
        stream.flush()
        return subprocess.Popen(
            [sys.executable, str(TYING_SCRIPT), *job.command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**job.environment, PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,
            pass_fds=job.held,
        )


def _ending(
    job: Job, process: subprocess.Popen[bytes], seconds: float, timeout: float
) -> tuple[Status, str] | None:
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


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
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


# ---------------------------------------- why a run failed


def explain(log: Path, exit_status: int) -> tuple[Status, str]:
    """Return the status of a run that ended with ``exit_status``, and its error in one line."""
    lines = _last_lines(log)
    for line in reversed(lines):
        if _OUT_OF_MEMORY.search(line):
            return "oom", _shorten(line)
    error = _error(lines)
    if error:
        return "failed", error
    if exit_status == -signal.SIGKILL or any(_KILLED.search(line) for line in lines):
        return "oom", "a process was killed (signal 9), most likely because host memory ran out"
    last = next((line for line in reversed(lines) if line.strip()), "")
    return "failed", _shorten(last) or f"ended with status {exit_status} and no message"


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    return [_RANK.sub("", line) for line in text.splitlines()]


def _error(lines: list[str]) -> str:
    """Find the last error that is not the echo of another rank's, with its list if it has one."""
    for number in reversed(range(len(lines))):
        if not _ERROR.match(lines[number]) or _CONSEQUENCE.search(lines[number]):
            continue
        stop = number + 1
        while stop < len(lines) and _LIST_ITEM.match(lines[stop]):
            stop += 1
        return _shorten(" ".join(line.strip() for line in lines[number:stop]))
    return ""


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 3] + "..."
