"""Model chunks that visit the device, simulated: copies beside computations, on shared links."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq1f1b.schedule import Action, Kind, Schedule, interleaved, lower, num_loads, visiting
from seq1f1b.simulate import (
    CostError,
    Costs,
    HostLink,
    Link,
    Memory,
    Simulation,
    copied_bytes,
    memory_over_time,
    peak_memory,
    simulate,
)


class Shape(NamedTuple):
    """Stages, chunks of each, micro-batches, splits, slots, and micro-batches of a turn."""

    p: int
    v: int
    m: int
    s: int
    k: int
    turn: int

    @property
    def plain(self) -> Schedule:
        return lower(interleaved(self.p, self.v, self.m, self.s, group=self.turn * self.s))

    def visiting(self, *, prefetch: bool = False) -> Schedule:
        return visiting(self.plain, self.k, prefetch=prefetch)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    p, v, s = draw(st.integers(2, 4)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    turns, turn = draw(st.integers(1, 3)), draw(st.integers(-(-p // s), 4))
    return Shape(p, v, turns * turn, s, draw(st.integers(1, v)), turn)


@st.composite
def host_links(draw: st.DrawFn, shape: Shape, *, shared: bool = False) -> HostLink:
    """Draw bytes of every chunk, and a link that is slower or faster than the computations."""
    size = st.sampled_from([0.5, 1.0, 3.0])
    weights, gradients = (
        tuple(tuple(draw(size) for _ in range(shape.v)) for _ in range(shape.p)) for _ in range(2)
    )
    bandwidth = draw(st.sampled_from([0.3, 1.0, 8.0]))
    roots = tuple(draw(st.integers(0, 1)) for _ in range(shape.p)) if shared else None
    return HostLink(weights, gradients, bandwidth, roots)


CASES = shapes().flatmap(lambda shape: st.tuples(st.just(shape), host_links(shape, shared=True)))
COSTS = st.sampled_from([0.0, 0.25])


def run(schedule: Schedule, host_link: HostLink, latency: float = 0.0) -> Simulation:
    """Simulate with later sub-sequences that take longer."""
    forwards = [1.0 + 0.25 * j for j in range(schedule.num_splits)]
    costs = Costs.of_forwards(schedule, forwards, backward_ratio=2.0)
    return simulate(schedule, costs, Link(latency=latency), host_link)


def timed(result: Simulation, stage: int) -> Iterator[tuple[Action, float, float]]:
    return zip(result.schedule.stages[stage], result.starts[stage], result.ends[stage], strict=True)


def copies(result: Simulation, stage: int, *, out: bool) -> list[tuple[Action, float, float]]:
    """Return what a lane copies, in the order of time."""
    kinds = (Kind.FREE_B,) if out else (Kind.LOAD_F, Kind.LOAD_B)
    return sorted((e for e in timed(result, stage) if e[0].kind in kinds), key=lambda e: e[1:])


@settings(max_examples=40)
@given(CASES, st.booleans(), COSTS)
def test_a_chunk_computes_between_its_load_and_its_free_alone_in_its_slot(case, prefetch, latency):
    shape, host_link = case
    schedule = shape.visiting(prefetch=prefetch)
    result = run(schedule, host_link, latency)
    for stage, slots in enumerate(schedule.slots):
        there: dict[int, float] = {}  # when each chunk on the device was
        given_up = [0.0] * shape.k
        taken: list[tuple[float, int]] = []
        for action, start, end in timed(result, stage):
            slot = slots[action.chunk]
            if action.kind.is_load:
                assert start >= given_up[slot]
                there[action.chunk] = end
                taken.append((start, 1))
            elif action.kind.is_free:
                assert start >= there.pop(action.chunk)
                given_up[slot] = end
                taken.append((end, -1))
            elif action.kind.is_compute:
                assert start >= there[action.chunk]
        held = 0
        for _, change in sorted(taken):
            held += change
            assert 0 <= held <= shape.k
        assert held == 0


@settings(max_examples=40)
@given(CASES, st.booleans())
def test_a_lane_is_busy_for_its_bytes_and_a_link_makes_one_copy_at_a_time(case, prefetch):
    shape, host_link = case
    schedule = shape.visiting(prefetch=prefetch)
    result = run(schedule, host_link)
    sizes = copied_bytes(schedule, host_link)
    for out in (False, True):
        for stage in range(shape.p):
            lane = copies(result, stage, out=out)
            total = sum(sizes[stage][action] for action, _, _ in lane) / host_link.bandwidth
            assert sum(end - start for _, start, end in lane) == pytest.approx(total)
            assert result.copying[stage][out] == pytest.approx(total)
        for root in set(host_link.roots):
            of_link = [
                copy[1:]
                for stage in range(shape.p)
                if host_link.roots[stage] == root
                for copy in copies(result, stage, out=out)
            ]
            for (_, end), (start, _) in pairwise(sorted(of_link)):
                assert start >= end - 1e-9


@settings(max_examples=40)
@given(shapes(), st.booleans())
def test_bytes_are_those_of_every_load_and_of_gradients_both_ways(shape, prefetch):
    schedule = shape.visiting(prefetch=prefetch)
    weights, gradients = ((1000.0,) * shape.v,) * shape.p, ((1.0,) * shape.v,) * shape.p
    for sizes, actions in zip(
        copied_bytes(schedule, HostLink(weights, gradients)), schedule.stages, strict=True
    ):
        loads = sum(action.kind.is_load for action in actions)
        leaves = sum(action.kind is Kind.FREE_B for action in actions)
        into = sum(size for action, size in sizes.items() if action.kind.is_load)
        out = sum(size for action, size in sizes.items() if action.kind.is_free)
        # of each chunk, gradients come back every time but the first that they are needed
        assert (into, out) == (1000.0 * loads + leaves - shape.v, leaves)
        if shape.turn == shape.m:
            assert (loads, leaves) == (num_loads(shape.v, shape.k), shape.v)


@settings(max_examples=30)
@given(shapes(), st.booleans(), COSTS)
def test_links_without_limit_take_no_time(shape, prefetch, latency):
    schedule = shape.visiting(prefetch=prefetch)
    result = run(schedule, HostLink.uniform(schedule, weights=5.0, gradients=9.0), latency)
    costs = Costs.of_forwards(
        schedule, [1.0 + 0.25 * j for j in range(shape.s)], backward_ratio=2.0
    )
    plain = simulate(shape.plain, costs, Link(latency=latency))
    assert result.step_time == plain.step_time
    for stage, actions in enumerate(shape.plain.stages):
        both = dict(zip(actions, plain.ends[stage], strict=True))
        others = {action: end for action, _, end in timed(result, stage) if action in both}
        assert others == both


@settings(max_examples=40)
@given(CASES, st.booleans())
def test_a_shared_link_delays_and_never_hastens_anything(case, prefetch):
    shape, shared = case
    own = HostLink(shared.weights, shared.gradients, shared.bandwidth)
    schedule = shape.visiting(prefetch=prefetch)
    slow, fast = run(schedule, shared), run(schedule, own)
    for stage in range(shape.p):
        for late, early in zip(slow.ends[stage], fast.ends[stage], strict=True):
            assert late >= early - 1e-9


@settings(max_examples=40)
@given(CASES)
def test_prefetching_never_takes_longer_on_a_link_of_ones_own(case):
    """On a shared one it may, by who asks first."""
    shape, shared = case
    own = HostLink(shared.weights, shared.gradients, shared.bandwidth)
    early, late = (run(shape.visiting(prefetch=early), own).step_time for early in (True, False))
    assert early <= late + 1e-9


def one_chunk_a_slot(*, prefetch: bool) -> Schedule:
    """Return 2 stages of 2 chunks and 2 micro-batches in one slot: loads 0, 1, 0."""
    return Shape(2, 2, 2, 1, 1, 2).visiting(prefetch=prefetch)


def test_copies_of_one_slot_follow_each_other_by_hand():
    schedule = one_chunk_a_slot(prefetch=True)
    host_link = HostLink.uniform(schedule, weights=2.0, gradients=4.0, bandwidth=2.0)
    costs = Costs.of_forwards(schedule, [1.0], backward_ratio=2.0)
    result = simulate(schedule, costs, host_link=host_link)
    last = {str(action): (start, end) for action, start, end in timed(result, 1)}
    first = {str(action): (start, end) for action, start, end in timed(result, 0)}
    # both stages load chunk 0 at once; stage 0 is through with it at 3, stage 1 at 4
    assert first["0LOAD_F0.0"] == last["0LOAD_F0.0"] == (0.0, 1.0)
    assert first["0F1.0"] == (2.0, 3.0)
    assert first["1LOAD_F0.0"] == (3.0, 4.0)
    assert last["1LOAD_F0.0"] == (4.0, 5.0)
    # chunk 1 stays from its forward to its backward, and its gradients go out for 2
    assert last["1FREE_B1.0"][1] - last["1FREE_B1.0"][0] == 2.0
    assert last["0LOAD_B0.0"][0] == last["1FREE_B1.0"][1]
    ends = [end for stage in (0, 1) for action, _, end in timed(result, stage)]
    assert result.step_time == max(ends) == first["0FREE_B1.0"][1]


def test_ranks_under_one_root_take_turns_in_the_order_of_asking():
    schedule = one_chunk_a_slot(prefetch=True)
    host_link = HostLink.uniform(schedule, weights=2.0, gradients=4.0, bandwidth=2.0, roots=(7, 7))
    costs = Costs.of_forwards(schedule, [1.0], backward_ratio=2.0)
    result = simulate(schedule, costs, host_link=host_link)
    loads = [
        (start, end, stage)
        for stage in (0, 1)
        for action, start, end in timed(result, stage)
        if action.kind.is_load
    ]
    assert sorted(loads)[:2] == [(0.0, 1.0, 0), (1.0, 2.0, 1)]


def test_ranks_under_one_root_can_share_it_evenly():
    schedule = one_chunk_a_slot(prefetch=True)
    one_by_one = HostLink.uniform(schedule, weights=2.0, gradients=4.0, bandwidth=2.0, roots=(7, 7))
    costs = Costs.of_forwards(schedule, [1.0], backward_ratio=2.0)
    for uplink, first_end in ((2.0, 2.0), (3.0, 4 / 3), (4.0, 1.0), (9.0, 1.0)):
        result = simulate(schedule, costs, host_link=replace(one_by_one, uplink=uplink))
        for stage in (0, 1):
            action, start, end = next(timed(result, stage))
            assert action.kind is Kind.LOAD_F
            assert (start, end) == (0.0, pytest.approx(first_end))


@settings(max_examples=30)
@given(CASES, st.booleans())
def test_a_step_does_not_feel_the_next_which_copies_as_much(case, prefetch):
    shape, host_link = case
    own = HostLink(host_link.weights, host_link.gradients, host_link.bandwidth)
    schedule = shape.visiting(prefetch=prefetch)
    costs = Costs.of_forwards(schedule, [1.0] * shape.s, backward_ratio=2.0)
    one, several = (simulate(schedule, costs, None, own, num_steps=n) for n in (1, 3))
    for stage, actions in enumerate(schedule.stages):
        length = len(actions)
        assert several.ends[stage][:length] == pytest.approx(one.ends[stage])
        assert len(several.ends[stage]) == 3 * length
    assert [sum(pair) for pair in several.copying] == pytest.approx(
        [3 * sum(pair) for pair in one.copying]
    )
    assert several.busy == pytest.approx([3 * busy for busy in one.busy])


def test_loads_that_take_half_as_long_as_computing_cost_what_nothing_hides():
    """2 stages, 4 chunks, 2 slots, 8 micro-batches: 6 loads in one turn."""
    shape = Shape(2, 4, 8, 1, 2, 8)
    computing = 8 * 4 * 3.0
    sizes = {"weights": 1.0, "gradients": 1.0, "bandwidth": 6 / (computing / 2)}

    def over_computing(shape: Shape, *, prefetch: bool, **more) -> float:
        schedule = shape.visiting(prefetch=prefetch)
        costs = Costs.of_forwards(schedule, [1.0], backward_ratio=2.0)
        host_link = HostLink.uniform(schedule, **sizes, **more)
        return simulate(schedule, costs, host_link=host_link).step_time / computing

    plain = simulate(shape.plain, Costs.of_forwards(shape.plain, [1.0], backward_ratio=2.0))
    resident, load = plain.step_time / computing, 1 / 12
    assert resident == pytest.approx(1 + 1 / 32)
    # the first load, and the last gradients, have nothing to hide behind
    assert over_computing(shape, prefetch=True) == pytest.approx(resident + 2 * load)
    # all 6 loads stand in the way
    assert over_computing(shape, prefetch=False) == pytest.approx(resident + 7 * load)
    shared = over_computing(shape, prefetch=True, roots=(0, 0))
    assert resident + 2 * load < shared < resident + 7 * load
    # 18 loads or more, and gradients that come back with a half of them
    turns = shape._replace(turn=2)
    assert over_computing(turns, prefetch=False) > resident + 19 * load


def test_slots_of_the_largest_chunk_are_what_weights_and_gradients_take():
    schedule = Shape(2, 3, 2, 1, 2, 2).visiting()
    result = run(schedule, HostLink.uniform(schedule, weights=1.0, gradients=1.0))
    chunks = [[Memory((1.0,), weights=w, gradients=2 * w) for w in (10.0, 1.0, 4.0)]] * 2
    assert [curve[-1][1] for curve in memory_over_time(result, chunks)] == [2 * 30.0] * 2
    live = [Memory((1.0,))] * 3
    activations = peak_memory(result, [live] * 2)
    assert peak_memory(result, chunks) == tuple(60.0 + held for held in activations)
    plain = simulate(lower(interleaved(2, 3, 2, 1)), Costs.uniform(schedule))
    assert [curve[-1][1] for curve in memory_over_time(plain, chunks)] == [45.0] * 2


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"weights": ((1.0,),) * 2}, r"weights of \[1, 1\] model chunks by stage"),
        (
            {"gradients": ((1.0, 1.0),)},
            r"gradients of \[2\] model chunks by stage; .* on each of 2",
        ),
        ({"roots": (0,)}, "roots of 1 stages for 2"),
        ({"bandwidth": 0.0}, "a bandwidth of 0 bytes/s copies nothing"),
        ({"bandwidth": math.nan}, "a bandwidth of nan bytes/s copies nothing"),
        ({"uplink": 0.0}, "a bandwidth of 0 bytes/s copies nothing"),
    ],
)
def test_a_link_that_does_not_fit_is_refused(change, complaint):
    schedule = one_chunk_a_slot(prefetch=True)
    fitting = {"weights": ((1.0, 1.0),) * 2, "gradients": ((1.0, 1.0),) * 2}
    with pytest.raises(CostError, match=complaint):
        run(schedule, HostLink(**fitting | change))


def test_a_schedule_without_loads_takes_no_host_link():
    schedule = one_chunk_a_slot(prefetch=True)
    with pytest.raises(ValueError, match="loads no model chunks"):
        run(Shape(2, 2, 2, 1, 1, 2).plain, HostLink.uniform(schedule, weights=1.0, gradients=1.0))
