"""Random situations equal one split or are refused, and would tell if a known fault came back."""

import pytest

from tests.distributed.generator import DEFAULT_SEED, TOLERANCE, run, situation, written
from tests.distributed.put_back import PUT_BACK, difference_with
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

# Of each fault, a case of the default seed that finds it.
FOUND_BY = {
    "batches_not_contiguous": 55,
    "losses_by_sub_sequence": 37,
    "padding_in_the_z_loss": 1,
    "one_key_for_two_losses": 59,
    "only_the_second_dimension_is_cut": 9,
    "masks_unread": 14,
    "fed_by_sub_sequence": 69,
}


class Pools(dict):
    """The session's pools by their size, started when one is asked for."""

    def __init__(self, workers):
        super().__init__()
        self.workers = workers

    def setdefault(self, size, default=None):
        return self.workers(size)


def check(workers, numbers):
    drawn = [situation(DEFAULT_SEED, number) for number in numbers]
    for number, of, verdict in zip(numbers, drawn, run(drawn, Pools(workers)), strict=True):
        assert not verdict, f"case {number}: {verdict} ({written(of)})"


@pytest.mark.long
def test_ten_situations(workers):
    check(workers, range(10))


@pytest.mark.long
@pytest.mark.parametrize("first", range(10, 70, 20))
def test_sixty_more(workers, first):
    check(workers, range(first, first + 20))


@pytest.mark.parametrize("fault", mostly_long(PUT_BACK, default=["padding_in_the_z_loss"]))
def test_a_fault_that_is_put_back_is_found(workers, fault):
    (found,) = workers(1).run(
        difference_with, fault, situation(DEFAULT_SEED, FOUND_BY[fault]), timeout=120
    )
    if isinstance(found, float):
        assert found > 10 * TOLERANCE
    else:
        assert "--seq1f1b-splits 1" not in found  # it is no refusal
