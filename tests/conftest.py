"""What all tests share: one thread per process, no network, no display, GPUs optional."""

import os
from collections.abc import Callable, Iterator

# Before torch and the tokenizers are imported, and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

from tests.workers import WorkerPool

torch.set_num_threads(1)

# A busy machine must not fail a test; CI repeats the same examples.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` on a machine without a CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], WorkerPool]]:
    """Return the pool of a given world size, started on first use."""
    pools: dict[int, WorkerPool] = {}

    def pool(size: int) -> WorkerPool:
        return pools.setdefault(size, WorkerPool(size))

    yield pool
    for started in pools.values():
        started.close()
