"""What all tests share: one thread per process, no network, no display, GPUs optional."""

import gc
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch and the tokenizers are imported, and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# What `seq1f1b calibrate` has written about this machine is no part of the tests.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="seq1f1b-tests-")

import hypothesis
import pytest
import torch

from tests.workers import WorkerPool

torch.set_num_threads(1)

_BEGIN = pytest.StashKey[float]()

# A busy machine must not fail a test; CI repeats the same examples.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Signals that a background job ignores. Programs that tests start would inherit that, but not a
# handler, and tests send them these signals.
for _signal in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run tests that take minutes")
    parser.addoption(
        "--minutes", type=float, help="skip tests that take minutes when so much time has passed"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many files run at a time: one a core and 6 GiB of memory, at most four.

    0, pytest's own process, where there is room for one or one file is asked for.
    """
    files = {Path(argument.partition("::")[0]) for argument in config.args}
    if len(files) == 1 and files.pop().is_file():
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = min(len(os.sched_getaffinity(0)), memory // (6 << 30), 4)
    return processes if processes > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    """Remember when the tests began; keep this run's options from pytest in programs they start."""
    config.stash[_BEGIN] = time.monotonic()
    os.environ.pop("PYTEST_ADDOPTS", None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave ``long`` tests out on a machine that is too slow for all of them."""
    minutes = item.config.getoption("--minutes")
    if minutes is None or not item.get_closest_marker("long"):
        return
    if time.monotonic() - item.config.stash[_BEGIN] > 60 * minutes:
        # a reason of its own, since pytest counts skips of the same reason and names none
        pytest.skip(f"--minutes {minutes:g} have passed: {item.nodeid}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave ``long`` tests out unless asked for; skip ``gpu`` ones without a CUDA device."""
    # Files with long tests come first: of several processes, none is left for the end.
    long_files = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long_files)
    if not config.getoption("--all") and "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Keep modules and tests out of garbage collections, which would look at all of them."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the minutes that each area of the tests took."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                area = "/".join(report.nodeid.split("::")[0].split("/")[:-1]) or "tests"
                seconds[area] += report.duration
    if sum(seconds.values()) < 60:
        return
    terminalreporter.section("minutes by area")
    for area, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent / 60:6.1f}  {area}")


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], WorkerPool]]:
    """Return the pool of a given world size, started on first use."""
    pools: dict[int, WorkerPool] = {}

    def pool(size: int) -> WorkerPool:
        return pools.setdefault(size, WorkerPool(size))

    yield pool
    for started in pools.values():
        started.close()
