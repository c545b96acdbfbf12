"""Work units: which rank computes which rows of which heads, at equal cost.

Ranks divide the heads of a layer. Where their number does not divide the heads, a rank gets parts
of heads: a range of rows, cut so that all ranks have as many (query, key) pairs to compute.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from seq1f1b.ulysses.rows import Pattern, Rows


@dataclass(frozen=True)
class Block:
    """Rows ``[start, stop)`` of heads ``[head, end)``, the same for all sequences of a batch."""

    head: int
    end: int
    start: int
    stop: int

    @property
    def num_heads(self) -> int:
        """Heads of the block."""
        return self.end - self.head

    @property
    def num_rows(self) -> int:
        """Rows of the block."""
        return self.stop - self.start

    def overlap(self, start: int, stop: int) -> tuple[int, int]:
        """Return the rows within ``[start, stop)``; an empty range if there are none."""
        low = max(self.start, start)
        return low, max(low, min(self.stop, stop))


@dataclass(frozen=True)
class Unit:
    """One call of an attention core: a block of queries, and the keys and values it looks at.

    All heads of ``queries`` share one head of keys, or each head of keys in ``keys`` has as many.
    """

    queries: Block
    keys: Block


@dataclass(frozen=True)
class WorkPlan:
    """What each rank computes and needs: ``units[r]``, and the key blocks it gets, ``keys[r]``."""

    units: tuple[tuple[Unit, ...], ...]
    keys: tuple[tuple[Block, ...], ...]

    @cached_property
    def queries(self) -> tuple[tuple[Block, ...], ...]:
        """The blocks of queries of each rank, in the order of its units."""
        return tuple(tuple(unit.queries for unit in units) for units in self.units)

    def num_pairs(self, costs: Tensor) -> list[int]:
        """Return how many (query, key) pairs each rank computes, given ``Rows.costs``."""
        return [
            sum(
                u.queries.num_heads * int(costs[u.queries.stop] - costs[u.queries.start])
                for u in units
            )
            for units in self.units
        ]

    def num_elements_sent(self, rank: int, shard: int, key_dim: int, value_dim: int) -> int:
        """Return the elements per sequence that ``rank`` sends to others in one forward pass.

        Queries and outputs, of ``key_dim`` and ``value_dim`` per row and head, and keys and values,
        once to every rank that needs them. ``shard`` is the number of rows that a rank holds.
        """
        own = rank * shard, (rank + 1) * shard
        sent = 0
        for other in range(len(self.units)):
            if other == rank:
                continue
            away = other * shard, (other + 1) * shard
            sent += _volume(self.queries[other], own) * key_dim
            sent += _volume(self.keys[other], own) * (key_dim + value_dim)
            sent += _volume(self.queries[rank], away) * value_dim
        return sent


def plan_work(
    num_heads: int,
    num_kv_heads: int,
    size: int,
    rows: Rows,
    pattern: Pattern,
    part: slice | None = None,
) -> WorkPlan:
    """Divide the heads of a layer among ``size`` ranks; ``part`` of the rows, or all of them."""
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_kv_heads} heads of keys cannot serve {num_heads} heads of queries")
    group = num_heads // num_kv_heads
    begin, end = (0, rows.length) if part is None else (part.start, part.stop)
    first = rows.first(pattern).min(dim=0).values
    bounds = _bounds(num_heads, size, rows.costs(pattern)[begin : end + 1], begin)
    units = tuple(
        tuple(
            Unit(block, _keys_of(block, group, first))
            for share in _blocks(low, high, begin, end)
            for block in _regular(share, group)
        )
        for low, high in pairwise(bounds)
    )
    return WorkPlan(units, tuple(_union([unit.keys for unit in of_rank]) for of_rank in units))


def held_keys(num_heads: int, num_kv_heads: int, size: int, part: slice) -> list[list[Block]]:
    """Return the heads of keys that each rank has work with, whichever its rows, at ``part``."""
    group = num_heads // num_kv_heads
    held = []
    for rank in range(size):
        first, last = rank * num_heads // size, -(-(rank + 1) * num_heads // size)
        held.append([Block(first // group, -(-last // group), part.start, part.stop)])
    return held


def _bounds(num_heads: int, size: int, costs: Tensor, begin: int) -> list[tuple[int, int]]:
    """Return where each rank's share begins and the last one's ends, as (head, row)."""
    costs = costs - costs[0]
    total = int(costs[-1])
    bounds = []
    for rank in range(size + 1):
        head, rest = divmod(rank * num_heads, size)
        row = _nearest(costs, total * rest // size) if rest else 0
        bounds.append((head, begin + row))
    return bounds


def _nearest(costs: Tensor, wanted: int) -> int:
    """Return the number of rows whose cost is nearest to ``wanted``."""
    row = int(torch.searchsorted(costs, wanted))
    if row and wanted - int(costs[row - 1]) < int(costs[row]) - wanted:
        row -= 1
    return row


def _blocks(low: tuple[int, int], high: tuple[int, int], begin: int, end: int) -> list[Block]:
    """Return the end of a head, whole heads and the start of a head between two bounds.

    A head's rows are ``[begin, end)``.
    """
    (first, start), (last, stop) = low, high
    if first == last:
        return [Block(first, first + 1, start, stop)] if stop > start else []
    blocks = []
    if start > begin:
        if start < end:
            blocks.append(Block(first, first + 1, start, end))
        first += 1
    if last > first:
        blocks.append(Block(first, last, begin, end))
    if stop > begin:
        blocks.append(Block(last, last + 1, begin, stop))
    return blocks


def _regular(block: Block, group: int) -> list[Block]:
    """Cut a block where groups of heads that share keys are not whole."""
    first, last = -(-block.head // group) * group, block.end // group * group
    if first >= last:
        cuts = [block.head, *([first] if block.head < first < block.end else []), block.end]
    else:
        cuts = sorted({block.head, first, last, block.end})
    return [Block(a, b, block.start, block.stop) for a, b in pairwise(cuts)]


def _keys_of(block: Block, group: int, first: Tensor) -> Block:
    """Return the keys that a block of queries sees; ``first`` never falls along a row."""
    heads = block.head // group, (block.end - 1) // group + 1
    return Block(*heads, int(first[block.start]), block.stop)


def _union(blocks: list[Block]) -> tuple[Block, ...]:
    """Return blocks that hold each head's rows once, neighbours with the same rows in one."""
    ranges: dict[int, tuple[int, int]] = {}
    for block in blocks:
        for head in range(block.head, block.end):
            start, stop = ranges.get(head, (block.start, block.stop))
            ranges[head] = min(start, block.start), max(stop, block.stop)
    merged: list[Block] = []
    for head in sorted(ranges):
        start, stop = ranges[head]
        if (
            merged
            and merged[-1].end == head
            and (merged[-1].start, merged[-1].stop) == (start, stop)
        ):
            merged[-1] = Block(merged[-1].head, head + 1, start, stop)
        else:
            merged.append(Block(head, head + 1, start, stop))
    return tuple(merged)


def _volume(blocks: tuple[Block, ...], rows: tuple[int, int]) -> int:
    """Return how many rows of heads of the blocks lie in a range."""
    total = 0
    for block in blocks:
        low, high = block.overlap(*rows)
        total += block.num_heads * (high - low)
    return total
