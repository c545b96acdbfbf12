"""Work units: every row of every head once, equal cost, and no key sent that is not needed."""

import itertools

import pytest
import torch

from seq1f1b.ulysses.rows import Pattern, Rows
from seq1f1b.ulysses.units import plan_work

LENGTH = 4096
SHAPES = [(3, 3), (6, 2), (4, 1), (5, 5), (71, 1), (28, 4), (8, 8), (12, 4), (1, 1)]


def rows(*documents: int) -> Rows:
    lengths = documents or (LENGTH,)
    return Rows.read(torch.cat([torch.arange(n) for n in lengths])[None])


@pytest.mark.parametrize("heads, kv_heads", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(window=100)])
def test_units_cover_everything_once_at_equal_cost(heads, kv_heads, size, pattern):
    whole = rows()
    plan = plan_work(heads, kv_heads, size, whole, pattern)
    counted = torch.zeros(heads, LENGTH, dtype=torch.long)
    for unit in itertools.chain.from_iterable(plan.units):
        q, k = unit.queries, unit.keys
        counted[q.head : q.end, q.start : q.stop] += 1
        group = heads // kv_heads
        assert k.head == q.head // group
        assert k.end == (q.end - 1) // group + 1
        one_group = k.end - k.head == 1
        assert one_group or (q.head % group == 0 and q.end % group == 0)
        assert k.start <= int(whole.first(pattern)[0, q.start])
        assert k.stop == q.stop
    assert bool((counted == 1).all())
    pairs = plan.num_pairs(whole.costs(pattern))
    assert max(pairs) * size / sum(pairs) < 1.02


@pytest.mark.parametrize("size", [2, 4])
def test_packed_documents_are_balanced_too(size):
    packed = rows(100, 2000, 30, 1500, 466)
    plan = plan_work(3, 3, size, packed, Pattern())
    pairs = plan.num_pairs(packed.costs(Pattern()))
    assert max(pairs) * size / sum(pairs) < 1.02


@pytest.mark.parametrize("heads, kv_heads, size", [(8, 4, 4), (8, 8, 2), (32, 8, 8)])
def test_divisible_heads_are_sent_once(heads, kv_heads, size):
    plan = plan_work(heads, kv_heads, size, rows(), Pattern())
    shard, key_dim, value_dim = LENGTH // size, 16, 12
    others = (size - 1) * shard
    wanted = others * (
        heads // size * (key_dim + value_dim) + kv_heads // size * (key_dim + value_dim)
    )
    for rank in range(size):
        assert plan.num_elements_sent(rank, shard, key_dim, value_dim) == wanted


def test_keys_that_no_row_sees_stay_where_they_are():
    windowed = plan_work(1, 1, 4, rows(), Pattern(window=64))
    for rank, (keys,) in enumerate(windowed.keys):
        assert keys.num_rows <= LENGTH // 4 + 64, rank
    plain = plan_work(1, 1, 4, rows(), Pattern())
    assert [keys[0].stop for keys in plain.keys] == [2048, 2896, 3547, 4096]


def test_heads_that_cannot_share_keys_are_refused():
    with pytest.raises(ValueError, match="3 heads of keys cannot serve 8"):
        plan_work(8, 3, 2, rows(), Pattern())
