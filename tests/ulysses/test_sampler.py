"""The sampler is torch's DistributedSampler over groups, and goes on in mid-epoch."""

import pytest
import torch
from torch.utils.data import DistributedSampler

from seq1f1b.ulysses import SequenceParallelSampler, init_sequence_parallel

pytestmark = pytest.mark.distributed


def draw(size: int, length: int, options: dict[str, bool]) -> tuple[list[int], list[int], int]:
    parallel = init_sequence_parallel(size)
    data = range(length)
    ours = SequenceParallelSampler(data, seed=5, **options)
    torchs = DistributedSampler(data, parallel.data_size, parallel.data_rank, seed=5, **options)
    for sampler in (ours, torchs):
        sampler.set_epoch(3)
    return list(ours), list(torchs), len(ours)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("length", [3, 16, 17])
@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"drop_last": True}])
def test_samples_are_those_of_torch(workers, size, length, options):
    results = workers(4).run(draw, size, length, options)
    for rank, (ours, torchs, declared) in enumerate(results):
        assert ours == torchs
        assert declared == len(ours)
        assert ours == results[rank // size * size][0]


def resume(before: int, after: int, consumed: int) -> list[int]:
    """Draw the first samples over groups of one size and the rest over groups of another."""
    init_sequence_parallel(before)
    sampler = SequenceParallelSampler(range(24), seed=1)
    sampler.set_epoch(2)
    drawn = iter(sampler)
    for _ in range(consumed // sampler.world_size):
        next(drawn)
    state = sampler.state_dict()
    assert state["num_consumed"] == consumed
    init_sequence_parallel(after)
    again = SequenceParallelSampler(range(24), seed=99)
    again.load_state_dict(state)
    return list(again)


@pytest.mark.parametrize("before, after", [(1, 1), (1, 4), (2, 1)])
def test_an_epoch_goes_on_over_other_groups(workers, before, after):
    results = workers(4).run(resume, before, after, 12)
    generator = torch.Generator().manual_seed(1 + 2)
    rest = torch.randperm(24, generator=generator).tolist()[12:]
    groups = 4 // after
    for rank, drawn in enumerate(results):
        assert drawn == rest[rank // after :: groups]


def without_rounding(size: int) -> list[int]:
    init_sequence_parallel(size)
    return list(SequenceParallelSampler(range(7), shuffle=False, round_up=False))


def test_without_rounding_nothing_is_repeated(workers):
    drawn = workers(4).run(without_rounding, 2)
    assert drawn == [[0, 2, 4, 6], [0, 2, 4, 6], [1, 3, 5], [1, 3, 5]]


def agreed_seed() -> int:
    init_sequence_parallel(2)
    return SequenceParallelSampler(range(7)).seed


def test_ranks_draw_one_seed(workers):
    assert len(set(workers(4).run(agreed_seed))) == 1


def test_a_new_epoch_starts_at_its_first_sample():
    init_sequence_parallel(1)
    sampler = SequenceParallelSampler(range(5), shuffle=False, seed=0)
    sampler.load_state_dict({"epoch": 0, "seed": 0, "num_consumed": 3})
    assert list(sampler) == [3, 4]
    assert list(sampler) == [0, 1, 2, 3, 4]
    sampler.set_epoch(1)
    assert sampler.state_dict() == {"epoch": 1, "seed": 0, "num_consumed": 0}
