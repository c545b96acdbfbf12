"""What a failed run's log says went wrong."""

import re
import signal
from pathlib import Path

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


def explain(log: Path, exit_status: int) -> tuple[str, str]:
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
