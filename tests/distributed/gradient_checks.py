"""Steps of training on workers, whose gradients are compared on every rank."""

from collections.abc import Callable, Sequence

from tests.distributed.megatron_model import Case, worst_gradient_error
from tests.workers import WorkerPool


def errors(cases: Sequence[Case]) -> list[tuple[Case, float]]:
    """Return the largest error of any gradient on this rank, for each case."""
    return [(case, worst_gradient_error(case)) for case in cases]


def check(workers: Callable[[int], WorkerPool], num_stages: int, cases: Sequence[Case]) -> None:
    """Assert that no gradient of any case is off by 1e-5 of the largest, on any rank."""
    for results in workers(num_stages).run(errors, cases, timeout=300):
        assert len(results) == len(cases)
        for case, error in results:
            assert error < 1e-5, case
