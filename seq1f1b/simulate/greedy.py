"""The schedule that a list scheduler finds, from costs and a memory cap."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import inf

from seq1f1b.schedule import (
    Action,
    Kind,
    Schedule,
    gpipe,
    interleaved,
    peak_live,
    zb_h1,
)
from seq1f1b.simulate.costs import Costs, Link
from seq1f1b.simulate.list_scheduler import Rule, order
from seq1f1b.simulate.simulator import simulate

_ROUNDING = 1e-9


def greedy(
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    num_splits: int,
    costs: Costs,
    link: Link | None = None,
    *,
    max_live: int | Sequence[int] | None = None,
) -> Schedule:
    """Return the schedule with the shortest simulated step among many within a memory cap.

    It tries those in closed form that fit ((Seq)1F1B, GPipe and ZB-H1, or interleaved 1F1B), and
    those that a list scheduler finds by a handful of rules, with backwards whole or split. So it is
    never slower than the closed forms under the same cap. The first of equals wins and nothing is
    random: the same costs give the same schedule on every rank.

    ``costs`` has F, B, I and W of this shape. ``max_live`` is how many sub-sequences (on one chunk
    each) every stage, or each, may hold from F to the end of B or W: unless given, what the
    first stage holds under (Seq)1F1B, interleaved with several chunks.

    Raises ValueError for a cap that does not hold one micro-batch, num_chunks * num_splits, and for
    several chunks on a single stage; CostError when a cost is missing.
    """
    shape = interleaved(num_stages, num_chunks, num_micro_batches, num_splits)
    if max_live is None:
        max_live = max(peak_live(shape))
    caps = (max_live,) * num_stages if isinstance(max_live, int) else tuple(max_live)
    if len(caps) != num_stages:
        raise ValueError(f"{len(caps)} memory caps for {num_stages} stages")
    if min(caps) < num_chunks * num_splits:
        raise ValueError(
            f"a cap of {min(caps)} sub-sequences does not hold one micro-batch, which has "
            f"{num_chunks * num_splits} on a stage ({num_splits} on each of {num_chunks} chunks)"
        )
    best = _best(shape, costs, link or Link(), caps)
    return replace(best, name="greedy")


def _candidates(
    shape: Schedule, costs: Costs, link: Link, caps: Sequence[int]
) -> Iterator[Schedule]:
    """Yield what fits the caps: first what is known in closed form, then what rules make."""
    for schedule in _closed_forms(shape):
        if all(live <= cap for live, cap in zip(peak_live(schedule), caps, strict=True)):
            yield schedule
    for rule in _rules(shape, caps):
        yield order(shape, costs, link, rule)


def _closed_forms(shape: Schedule) -> Iterator[Schedule]:
    sizes = shape.num_stages, shape.num_micro_batches, shape.num_splits
    yield shape
    if shape.num_chunks == 1:
        yield gpipe(*sizes)
        yield zb_h1(*sizes)


def _rules(shape: Schedule, caps: Sequence[int]) -> Iterator[Rule]:
    one_micro_batch = shape.num_chunks * shape.num_splits
    plain = [
        max(one_micro_batch, min(live, cap))
        for live, cap in zip(peak_live(shape), caps, strict=True)
    ]
    turns: list[int | None] = [None]
    if shape.num_chunks > 1:
        turns.insert(0, -(-shape.num_stages // shape.num_splits) * shape.num_splits)
    by_stage, at_once = range(shape.num_stages), [0] * shape.num_stages
    for turn in turns:
        for patience in (0.0, 0.5):
            yield Rule(caps, caps, turn=turn, patience=patience)
        for in_flight in (plain, caps):
            forward_first = Rule(caps, in_flight, forward_first=True, turn=turn)
            yield forward_first
            yield replace(forward_first, patience=0.5)
            yield replace(forward_first, deferred=by_stage)
            yield replace(forward_first, deferred=at_once)
            yield replace(forward_first, split=False)


def _best(shape: Schedule, costs: Costs, link: Link, caps: Sequence[int]) -> Schedule:
    """Return the fastest; stop looking at one that nothing can beat."""
    bound = _lower_bound(shape, costs, link) * (1 + _ROUNDING)
    best, step_time = shape, inf
    for candidate in _candidates(shape, costs, link, caps):
        time = simulate(candidate, costs, link).step_time
        if time >= step_time * (1 - _ROUNDING):
            continue
        fused = _fused(candidate, costs)
        fused_time = simulate(fused, costs, link).step_time
        best, step_time = (fused, fused_time) if fused_time <= time else (candidate, time)
        if step_time <= bound:
            break
    return best


def _lower_bound(shape: Schedule, costs: Costs, link: Link) -> float:
    """Return a time that no order beats: each stage's work, after what must come before it."""
    head = bound = 0.0
    for stage in range(shape.num_stages):
        work = 0.0
        for chunk, j in product(range(shape.num_chunks), range(shape.num_splits)):
            forward, backward, half, weight = (
                costs.of(stage, Action(kind, chunk, 0, j))
                for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
            )
            work += forward + min(backward, half + weight)
        bound = max(bound, head + work * shape.num_micro_batches)
        head += costs.of(stage, Action(Kind.F, 0, 0, 0)) + link.transfer(0) + link.latency
    return bound


def _fused(schedule: Schedule, costs: Costs) -> Schedule:
    """Make one B of each I that its own W follows, where that takes no longer."""
    stages = []
    for stage, actions in enumerate(schedule.stages):
        fused: list[Action] = []
        for action in actions:
            half = action.of_kind(Kind.I)
            whole = action.of_kind(Kind.B)
            if (
                action.kind is Kind.W
                and fused[-1] == half
                and costs.of(stage, whole) <= costs.of(stage, half) + costs.of(stage, action)
            ):
                fused[-1] = whole
            else:
                fused.append(action)
        stages.append(tuple(fused))
    return schedule.with_stages(tuple(stages), lowered=schedule.lowered)
