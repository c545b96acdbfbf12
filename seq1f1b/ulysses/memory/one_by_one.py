"""Attention one unit of work at a time: only one unit's queries, keys and values are gathered.

The backward pass gathers them again, so nothing that is as long as the whole rows is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from seq1f1b.ulysses.cores import Core, Options, Scope
from seq1f1b.ulysses.exchange import Exchange, Route
from seq1f1b.ulysses.units import Block, Unit, WorkPlan


@dataclass(frozen=True)
class Round:
    """One unit for each rank, or none: the routes of queries and keys, and this rank's unit."""

    queries: Route
    keys: Route
    unit: Unit | None


def make_rounds(plan: WorkPlan, rank: int) -> list[Round]:
    """Divide the work of all ranks into rounds of one head of keys each."""
    fine = [[part for unit in units for part in _by_head(unit)] for units in plan.units]
    return [
        Round(
            [[] if unit is None else [unit.queries] for unit in units],
            [[] if unit is None else [unit.keys] for unit in units],
            units[rank],
        )
        for units in zip_longest(*fine)
    ]


def _by_head(unit: Unit) -> list[Unit]:
    """Cut a unit into one for each head of its keys."""
    q, k = unit.queries, unit.keys
    group = q.num_heads // k.num_heads
    return [
        Unit(
            Block(q.head + i * group, q.head + (i + 1) * group, q.start, q.stop),
            Block(k.head + i, k.head + i + 1, k.start, k.stop),
        )
        for i in range(k.num_heads)
    ]


@dataclass(frozen=True)
class OneByOne:
    """What the rounds share: how to choose a core, and what a unit's scope and options are."""

    exchange: Exchange
    rounds: list[Round]
    scope_of: Callable[[Unit], Scope]
    options_of: Callable[[Unit], Options]
    core_for: Callable[..., Core]


def attend_one_by_one(
    work: OneByOne, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
) -> Tensor:
    """Return ``[b, heads, shard, v dim]``; tensors are those of ``group_attention``."""
    return _Rounds.apply(work, query, key, value, sinks)


class _Rounds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: OneByOne, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        shape = query.shape[0], query.shape[1], value.shape[3]
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        kept: list[tuple[Tensor, ...]] = []
        for each in work.rounds:
            made = []
            routes = [each.queries, each.keys, each.keys]
            blocks = work.exchange.gather_blocks((query, key, value), routes)
            if each.unit is not None:
                core, arguments = _call(work, each.unit, blocks, sinks)
                part, saved = core.forward(*arguments)
                made, kept = [part], [*kept, saved]
            else:
                kept = [*kept, ()]
            output += work.exchange.gather_rows(
                made, [each.queries], [shape], query, overlap=False
            )[0]
        ctx.work, ctx.lengths = work, [len(saved) for saved in kept]
        ctx.save_for_backward(query, key, value, sinks, output, *(x for xs in kept for x in xs))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        query, key, value, sinks, output, *flat = ctx.saved_tensors
        work: OneByOne = ctx.work
        tensors = query, key, value
        totals = [torch.zeros_like(x, dtype=_wide(x)) for x in tensors]
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=_wide(sinks))
        shapes = [(x.shape[0], x.shape[1], x.shape[3]) for x in tensors]
        saved = iter(flat)
        for each, length in zip(work.rounds, ctx.lengths, strict=True):
            routes = [each.queries, each.keys, each.keys]
            blocks = work.exchange.gather_blocks(tensors, routes)
            answers = work.exchange.gather_blocks(
                (output, grad_output), [each.queries, each.queries]
            )
            made: list[Tensor] = []
            if each.unit is not None:
                core, (q, k, v, own, scope, options) = _call(work, each.unit, blocks, sinks)
                out, grad = answers
                state = tuple(next(saved) for _ in range(length))
                *made, of_sinks = core.backward(grad, q, k, v, own, out, state, scope, options)
                if grad_sinks is not None and of_sinks is not None:
                    heads = slice(each.unit.queries.head, each.unit.queries.end)
                    grad_sinks[heads] += of_sinks
            rows = work.exchange.gather_rows(made, routes, shapes, query, overlap=True)
            for total, part in zip(totals, rows, strict=True):
                total += part
        grads = [total.to(x.dtype) for total, x in zip(totals, tensors, strict=True)]
        of_sinks = None if grad_sinks is None else grad_sinks.to(sinks.dtype)
        return None, *grads, of_sinks


def _call(work: OneByOne, unit: Unit, blocks: list[Tensor], sinks: Tensor | None) -> Any:
    """Return the core for a unit and the arguments of its forward."""
    q, k, v = blocks
    own = None if sinks is None else sinks[unit.queries.head : unit.queries.end]
    scope, options = work.scope_of(unit), work.options_of(unit)
    return work.core_for(q, v, own, scope, options), (q, k, v, own, scope, options)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
