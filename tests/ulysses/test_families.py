"""Loss and every gradient of each family on a group of ranks against one process, in float32."""

import pytest

from seq1f1b.ulysses import init_sequence_parallel
from seq1f1b.ulysses.check.batches import Batch, make_batch
from seq1f1b.ulysses.check.compare import Comparison, compare
from seq1f1b.ulysses.shrink import VOCABULARY
from tests.ulysses.families import FAMILIES, FAST

pytestmark = pytest.mark.distributed

LAYOUTS = ("plain", "packed", "padded", "padded-left")


def run_family(name: str, num_rows: tuple[int, ...], size: int) -> list[Comparison]:
    family = FAMILIES[name]
    init_sequence_parallel(size)
    batches: list[tuple[str, Batch]] = [
        (layout, make_batch(layout, VOCABULARY, num_rows=rows))
        for layout in LAYOUTS
        for rows in num_rows
    ]
    return compare(family.build, batches, size, packed_as_one_row=family.as_one_row)


def check(workers, name: str, size: int, num_rows: tuple[int, ...]) -> None:
    results = workers(size).run(run_family, name, num_rows, size)[0]
    assert len(results) == len(LAYOUTS) * len(num_rows)
    for result in results:
        assert result.is_exact, (result.layout, result.num_rows, result.loss_error, result.worst)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("size", [2, 4])
def test_family_is_exact(workers, name, size):
    check(workers, name, size, (2,))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [2, 4])
def test_every_family_is_exact(workers, name, size):
    check(workers, name, size, (1, 2))


def test_there_are_enough_model_types():
    assert len({family.model_type for family in FAMILIES.values()}) >= 70
