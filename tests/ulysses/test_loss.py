"""The reduced loss: the mean over all targets, and a gradient that averages to one process's."""

import pytest
import torch
import torch.distributed as dist

from seq1f1b.ulysses import init_sequence_parallel, reduce_sequence_parallel_loss

pytestmark = pytest.mark.distributed


def averaged_gradient(counts: tuple[int, ...], size: int) -> tuple[float, float, bool]:
    """Return the loss, the gradient error and whether all is finite on this rank.

    Target i's loss is ``(weight * x_i) ** 2``; a rank without targets has the mean of nothing.
    """
    parallel = init_sequence_parallel(size)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(counts), generator=generator, dtype=torch.float64)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    own = inputs.split(list(counts))[dist.get_rank()]
    loss = reduce_sequence_parallel_loss(((weight * own) ** 2).mean(), torch.tensor(len(own)))
    loss.backward()
    assert weight.grad is not None
    gradient = weight.grad.clone()
    dist.all_reduce(gradient)
    gradient /= dist.get_world_size()
    groups = inputs.split([sum(counts[i : i + size]) for i in range(0, len(counts), size)])
    wanted = torch.stack([2 * 0.7 * (x**2).sum() / max(len(x), 1) for x in groups]).mean()
    expected = ((0.7 * groups[parallel.data_rank]) ** 2).sum() / max(
        len(groups[parallel.data_rank]), 1
    )
    finite = bool(torch.isfinite(loss) & torch.isfinite(gradient))
    assert abs(float(loss.detach() - expected)) < 1e-6
    return float(loss.detach()), float((gradient - wanted).abs() / wanted.abs().clamp(1e-9)), finite


@pytest.mark.parametrize("counts", [(1, 4), (4, 1), (0, 5), (3, 3), (0, 0)])
def test_uneven_shards(workers, counts):
    for _, error, finite in workers(2).run(averaged_gradient, counts, 2):
        assert finite
        assert error < 1e-6


@pytest.mark.parametrize("size", [1, 2, 4])
def test_data_parallel_groups_average(workers, size):
    for _, error, finite in workers(4).run(averaged_gradient, (1, 6, 2, 3), size):
        assert finite
        assert error < 1e-6


def one_rank_empty_in_float32() -> bool:
    init_sequence_parallel(2)
    logits = torch.randn(3, 7, requires_grad=True)
    targets = torch.full((3,), -100) if dist.get_rank() else torch.tensor([1, 2, -100])
    mean = torch.nn.functional.cross_entropy(logits, targets)
    loss = reduce_sequence_parallel_loss(mean, (targets != -100).sum())
    loss.backward()
    assert logits.grad is not None
    return bool(torch.isfinite(loss) & torch.isfinite(logits.grad).all())


def test_the_mean_of_no_target_does_no_harm(workers):
    assert workers(2).run(one_rank_empty_in_float32) == [True, True]


def test_one_process_needs_no_group():
    init_sequence_parallel(1)
    loss = torch.tensor(2.5, requires_grad=True)
    reduced = reduce_sequence_parallel_loss(loss, torch.tensor(3))
    reduced.backward()
    assert float(reduced.detach()) == 2.5
    assert float(loss.grad) == 1.0  # type: ignore[arg-type]
