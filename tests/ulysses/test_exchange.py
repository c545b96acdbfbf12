"""The all-to-all: what is sent, counted, and that each direction is the other's gradient."""

import pytest
import torch
import torch.distributed as dist

from seq1f1b.ulysses import init_sequence_parallel
from seq1f1b.ulysses.attention import Scoring, group_attention
from seq1f1b.ulysses.exchange import Exchange
from seq1f1b.ulysses.rows import Pattern, Rows
from seq1f1b.ulysses.run import Run
from seq1f1b.ulysses.units import plan_work

pytestmark = pytest.mark.distributed

LENGTH, KEY_DIM, VALUE_DIM = 64, 8, 6


def whole_rows() -> Rows:
    return Rows.read(torch.arange(LENGTH)[None].expand(2, LENGTH))


def attention_step(heads: int, kv_heads: int) -> tuple[int, int, int]:
    """Return bytes sent forward by the counter and by the formula, and bytes sent backward."""
    size = dist.get_world_size()
    parallel = init_sequence_parallel(size)
    rows, shard = whole_rows(), LENGTH // size
    run = Run(parallel, rows)
    q = torch.randn(2, heads, shard, KEY_DIM, requires_grad=True)
    k = torch.randn(2, kv_heads, shard, KEY_DIM, requires_grad=True)
    v = torch.randn(2, kv_heads, shard, VALUE_DIM, requires_grad=True)
    before = parallel.traffic.bytes_sent
    output = group_attention(run, "layer", q, k, v, Pattern(), Scoring(0.3))
    forward = parallel.traffic.bytes_sent - before
    output.sum().backward()
    backward = parallel.traffic.bytes_sent - before - forward
    plan = plan_work(heads, kv_heads, size, rows, Pattern())
    elements = plan.num_elements_sent(parallel.rank, shard, KEY_DIM, VALUE_DIM)
    return forward, elements * 2 * 4, backward


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (4, 1), (8, 4), (8, 8)])
def test_bytes_sent_are_those_of_the_formula(workers, size, heads, kv_heads):
    results = workers(size).run(attention_step, heads, kv_heads)
    for counted, formula, _ in results:
        assert counted == formula
    # Gradients travel the other way: what ranks send forward in sum, they send backward in sum.
    assert sum(r[0] for r in results) == sum(r[2] for r in results)


def minimum(heads: int, kv_heads: int, size: int) -> int:
    """Bytes that a rank must send: to every other rank, its share of heads of the own rows."""
    shard = LENGTH // size
    rows = 2 * (size - 1) * shard * (KEY_DIM + VALUE_DIM)
    return 4 * rows * (heads // size + kv_heads // size)


@pytest.mark.parametrize("heads, kv_heads, size", [(8, 4, 4), (8, 2, 2), (4, 4, 4)])
def test_grouped_keys_that_divide_are_sent_once(workers, heads, kv_heads, size):
    for counted, _, _ in workers(size).run(attention_step, heads, kv_heads):
        assert counted == minimum(heads, kv_heads, size)


def adjoint(heads: int) -> tuple[float, float]:
    """Return ``<A x, y>`` and ``<x, A* y>`` summed over ranks, for the exchange A to blocks."""
    size = dist.get_world_size()
    parallel = init_sequence_parallel(size)
    generator = torch.Generator().manual_seed(parallel.rank)
    exchange = Exchange(parallel, LENGTH // size)
    plan = plan_work(heads, heads, size, whole_rows(), Pattern())
    shape = 2, heads, LENGTH // size, KEY_DIM
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    (blocks,), token = exchange.to_blocks([x], [plan.keys])
    ys = [torch.randn(b.shape, generator=generator, dtype=torch.float64) for b in blocks]
    product = sum(((b * y).sum() for b, y in zip(blocks, ys, strict=True)), token)
    product.backward()
    assert x.grad is not None
    sums = torch.stack([product.detach(), (x.detach() * x.grad).sum()])
    dist.all_reduce(sums)
    return float(sums[0]), float(sums[1])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_gradients_go_the_way_back(workers, size, heads):
    for forward, backward in workers(size).run(adjoint, heads):
        assert forward == pytest.approx(backward, rel=1e-12)


def more_ranks_than_rows() -> bool:
    """Attend where some ranks have no work at all, forward and backward."""
    parallel = init_sequence_parallel(4)
    run = Run(parallel, Rows.read(torch.zeros(1, 4, dtype=torch.long)))
    x = torch.randn(1, 1, 1, 4, requires_grad=True)
    output = group_attention(run, "layer", x, x, x, Pattern(), Scoring(1.0))
    output.sum().backward()
    return torch.allclose(output, x) and x.grad is not None


def test_ranks_without_work_take_part(workers):
    assert workers(4).run(more_ranks_than_rows) == [True] * 4
