"""Attention over the whole group's rows, from each rank's shard of them."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from seq1f1b.ulysses.cores import Core, Options, Scope, attend, choose_core
from seq1f1b.ulysses.memory.carry import CarriedWork, attend_with_carry
from seq1f1b.ulysses.memory.one_by_one import OneByOne, attend_one_by_one, make_rounds
from seq1f1b.ulysses.rows import Pattern
from seq1f1b.ulysses.run import Run, each_alone
from seq1f1b.ulysses.units import Block, Unit, WorkPlan, held_keys


@dataclass(frozen=True)
class Scoring:
    """How a layer turns queries and keys into weights; see ``cores.Options``."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


def group_attention(
    run: Run,
    layer: Hashable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from the shard's tokens to what ``pattern`` lets them see of the group's rows.

    query ``[b, heads, shard, k dim]``, key ``[b, kv heads, shard, k dim]``, value
    ``[b, kv heads, shard, v dim]``, sinks ``[heads]`` or None; ``layer`` tells layers apart.
    Returns ``[b, heads, shard, v dim]``. All ranks of the group must call it alike.
    """
    run.num_mixed += 1
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if run.is_closed:
        return each_alone(value.repeat_interleave(num_heads // num_kv_heads, dim=1), query, key)
    work = _Work(run, run.rows.simplify(pattern), scoring)
    plan = run.plan(num_heads, num_kv_heads, work.pattern)
    if run.carry is not None:
        return _with_carry(work, plan, layer, query, key, value, sinks)
    if run.parallel.size == 1:
        (unit,) = plan.units[0]
        return work.compute(unit, query, key, value, sinks)
    if run.choices.unit_at_a_time:
        rounds = make_rounds(plan, run.parallel.rank)
        by_round = OneByOne(run.exchange, rounds, work.scope, work.options, work.core)
        return attend_one_by_one(by_round, query, key, value, sinks)
    routes = plan.queries, plan.keys, plan.keys
    (queries, keys, values), token = run.exchange.to_blocks((query, key, value), routes)
    held = plan.keys[run.parallel.rank]
    outputs = [
        work.compute(
            unit, q, _heads_of(keys, held, unit.keys), _heads_of(values, held, unit.keys), sinks
        )
        for unit, q in zip(plan.units[run.parallel.rank], queries, strict=True)
    ]
    shape = query.shape[0], num_heads, value.shape[3]
    return run.exchange.to_rows(outputs, plan.queries, shape, token)


class _Work:
    """How the units of one layer are computed."""

    def __init__(self, run: Run, pattern: Pattern, scoring: Scoring) -> None:
        self.run, self.pattern, self._scoring = run, pattern, scoring
        self._seed = int(torch.randint(2**62, ())) if scoring.dropout else 0

    def scope(self, unit: Unit) -> Scope:
        """Return which queries look at which keys."""
        rows = unit.queries.start, unit.queries.stop
        return Scope(self.run.rows, self.pattern, *rows, unit.keys.start)

    def options(self, unit: Unit) -> Options:
        """Return how scores become weights; units drop different ones."""
        scoring = self._scoring
        seed = self._seed + unit.queries.head
        return Options(scoring.scale, scoring.softcap, scoring.dropout, seed)

    def core(
        self, q: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
    ) -> Core:
        """Return what computes a unit."""
        return choose_core(self.run.choices.core, q, v, sinks, scope, options)

    def compute(self, unit: Unit, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Return a unit's output; ``sinks`` are those of all heads."""
        own = None if sinks is None else sinks[unit.queries.head : unit.queries.end]
        scope, options = self.scope(unit), self.options(unit)
        return attend(self.core(q, v, own, scope, options), q, k, v, own, scope, options)


def _with_carry(
    work: _Work,
    plan: WorkPlan,
    layer: Hashable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Attend from one sub-sequence to itself and to those before it."""
    run, rank = work.run, work.run.parallel.rank
    assert run.carry is not None
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    held = held_keys(num_heads, num_kv_heads, run.parallel.size, run.part)
    queries, keys, values, token = [query], key, value, query.new_zeros(())
    if run.parallel.size > 1:
        tensors, routes = (query, key, value), (plan.queries, held, held)
        (queries, (keys,), (values,)), token = run.exchange.to_blocks(tensors, routes)
    carried = CarriedWork(
        run.carry.layer(layer, keys, values),
        run.part,
        held[rank][0],
        plan.units[rank],
        work.scope,
        work.options,
        work.core,
    )
    outputs, extra = attend_with_carry(carried, queries, keys, values, sinks)
    if run.parallel.size == 1:
        return outputs[0] + extra
    shape = query.shape[0], num_heads, value.shape[3]
    return run.exchange.to_rows(outputs, plan.queries, shape, token + extra)


def _heads_of(blocks: list[Tensor], held: tuple[Block, ...], wanted: Block) -> Tensor:
    """Return the heads and rows of ``wanted`` from the blocks that hold them."""
    parts = []
    for x, block in zip(blocks, held, strict=True):
        head, end = max(block.head, wanted.head), min(block.end, wanted.end)
        if head < end:
            rows = slice(wanted.start - block.start, wanted.stop - block.start)
            parts.append(x[:, head - block.head : end - block.head, rows])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
