from collections.abc import Callable, Iterator

import pytest

from tests.workers import WorkerPool


@pytest.fixture(scope="session")
def workers() -> Iterator[Callable[[int], WorkerPool]]:
    """Return the pool of a given world size, started on first use."""
    pools: dict[int, WorkerPool] = {}

    def pool(size: int) -> WorkerPool:
        return pools.setdefault(size, WorkerPool(size))

    yield pool
    for started in pools.values():
        started.close()
