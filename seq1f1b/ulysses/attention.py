"""Attention over the whole group's rows, from each rank's shard of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seq1f1b.ulysses.cores import Options, Scope, attend, choose_core
from seq1f1b.ulysses.rows import Pattern
from seq1f1b.ulysses.run import Run, each_alone
from seq1f1b.ulysses.units import Block, Unit


@dataclass(frozen=True)
class Scoring:
    """How a layer turns queries and keys into weights; see ``cores.Options``."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


def group_attention(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from the shard's tokens to what ``pattern`` lets them see of the group's rows.

    query ``[b, heads, shard, k dim]``, key ``[b, kv heads, shard, k dim]``, value
    ``[b, kv heads, shard, v dim]``, sinks ``[heads]`` or None. Returns
    ``[b, heads, shard, v dim]``. All ranks of the group must call it alike.
    """
    run.num_mixed += 1
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if run.is_closed:
        return each_alone(value.repeat_interleave(num_heads // num_kv_heads, dim=1), query, key)
    pattern = run.rows.simplify(pattern)
    plan = run.plan(num_heads, num_kv_heads, pattern)
    seed = int(torch.randint(2**62, ())) if scoring.dropout else 0
    options = Options(scoring.scale, scoring.softcap, scoring.dropout, seed)
    if run.parallel.size == 1:
        (unit,) = plan.units[0]
        return _compute(run, unit, query, key, value, sinks, pattern, options)
    routes = plan.queries, plan.keys, plan.keys
    (queries, keys, values), token = run.exchange.to_blocks((query, key, value), routes)
    outputs = [
        _compute(
            run,
            unit,
            q,
            _heads_of(keys, plan.keys[run.parallel.rank], unit.keys),
            _heads_of(values, plan.keys[run.parallel.rank], unit.keys),
            None if sinks is None else sinks[unit.queries.head : unit.queries.end],
            pattern,
            options,
        )
        for unit, q in zip(plan.units[run.parallel.rank], queries, strict=True)
    ]
    shape = query.shape[0], num_heads, value.shape[3]
    return run.exchange.to_rows(outputs, plan.queries, shape, token)


def _compute(
    run: Run,
    unit: Unit,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    pattern: Pattern,
    options: Options,
) -> Tensor:
    scope = Scope(run.rows, pattern, unit.queries.start, unit.queries.stop, unit.keys.start)
    if options.dropout:
        options = replace(options, seed=options.seed + unit.queries.head)
    core = choose_core(run.core, q, v, sinks, scope, options)
    return attend(core, q, k, v, sinks, scope, options)


def _heads_of(blocks: list[Tensor], held: tuple[Block, ...], wanted: Block) -> Tensor:
    """Return the heads and rows of ``wanted`` from the blocks that hold them."""
    parts = []
    for x, block in zip(blocks, held, strict=True):
        head, end = max(block.head, wanted.head), min(block.end, wanted.end)
        if head < end:
            rows = slice(wanted.start - block.start, wanted.stop - block.start)
            parts.append(x[:, head - block.head : end - block.head, rows])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
