"""The simulator against the closed forms, against a plain recursion, and on odd inputs."""

import math
import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq1f1b.schedule import (
    Action,
    Kind,
    Schedule,
    ScheduleError,
    Span,
    gpipe,
    interleaved,
    lower,
    one_f_one_b,
    zb_h1,
)
from seq1f1b.schedule.edges import dependencies, event
from seq1f1b.sequence import Documents, PackedCost, TokenCost, partition
from seq1f1b.simulate import CostError, Costs, CostsByMicroBatch, Link, formulas, simulate
from tests.schedule.shapes import MICRO_BATCHES, SPLITS, STAGES, schedules

TIMES = st.floats(0.1, 10)


@given(STAGES, MICRO_BATCHES, SPLITS, TIMES, TIMES)
def test_equal_costs_give_the_formulas_of_1f1b_and_seq1f1b(p, m, s, forward, backward):
    schedule = one_f_one_b(p, m, s)
    result = simulate(schedule, Costs.uniform(schedule, forward=forward, backward=backward))
    expected = formulas.step_time(p, 1, m, s, forward=forward, backward=backward)
    assert result.step_time == pytest.approx(expected, rel=1e-12)
    assert result.bubble_ratio == pytest.approx(formulas.bubble_ratio(p, 1, m, s), abs=1e-12)
    idle = [expected - m * (forward + backward)] * p
    assert result.idle == pytest.approx(idle, abs=1e-9 * expected)
    live = [formulas.live_micro_batches(p, m, s, stage) * s for stage in range(p)]
    assert result.peak_live == pytest.approx(live)


@given(STAGES, MICRO_BATCHES, SPLITS, TIMES)
def test_equal_costs_give_the_formula_of_gpipe(p, m, s, backward):
    schedule = gpipe(p, m, s)
    result = simulate(schedule, Costs.uniform(schedule, backward=backward))
    assert result.bubble_ratio == pytest.approx(formulas.bubble_ratio(p, 1, m, s), abs=1e-12)
    assert set(result.peak_live) == {m * s}


@given(STAGES, MICRO_BATCHES, SPLITS)
def test_zb_h1_of_equal_thirds_idles_a_third_of_1f1b_wherever_it_applies(p, m, s):
    schedule = zb_h1(p, m, s)
    result = simulate(schedule, Costs.uniform(schedule, forward=1.0, backward=2.0))
    bubble = formulas.zb_h1_bubble(p, s)
    plain = formulas.step_time(p, 1, m, s) - 3 * m
    assert bubble == pytest.approx(plain / 3)
    if formulas.zb_h1_applies(p, m, s):
        assert result.idle == pytest.approx([bubble] * p, abs=1e-9)
        ratio = formulas.zb_h1_bubble_ratio(p, m, s)
        assert result.bubble_ratio == pytest.approx(ratio, abs=1e-12)
    else:
        assert result.step_time > 3 * m + bubble + 1e-9


@given(STAGES, MICRO_BATCHES, SPLITS, TIMES, TIMES, st.floats(0.01, 1.0))
def test_zb_h1_idles_as_its_formula_says_while_w_is_the_shortest(p, m, s, forward, half, share):
    m = max(m, -(-(p + s - 1) // s))
    weight = share * min(forward, half)
    schedule = zb_h1(p, m, s)
    result = simulate(schedule, thirds(schedule, forward, half, weight))
    bubble = formulas.zb_h1_bubble(
        p, s, forward=forward, input_gradient=half, weight_gradient=weight
    )
    assert result.idle == pytest.approx([bubble] * p, abs=1e-7)


def thirds(schedule: Schedule, forward: float, half: float, weight: float) -> Costs:
    """Share out F, I and W of a stage and micro-batch evenly; B takes I and W."""
    times = {Kind.F: forward, Kind.B: half + weight, Kind.I: half, Kind.W: weight}
    share = 1 / (schedule.num_chunks * schedule.num_splits)
    parts = {
        (kind, chunk, j): time * share
        for kind, time in times.items()
        for chunk in range(schedule.num_chunks)
        for j in range(schedule.num_splits)
    }
    return Costs((parts,) * schedule.num_stages)


@given(st.integers(2, 8), st.integers(2, 4), MICRO_BATCHES, SPLITS, TIMES, st.integers(0, 5))
def test_interleaved_reaches_its_formula_whenever_a_turn_can_be_filled(p, v, m, s, backward, more):
    m = max(m, -(-p // s))
    schedule = interleaved(p, v, m, s, group=p + more)
    result = simulate(schedule, Costs.uniform(schedule, backward=backward))
    expected = formulas.step_time(p, v, m, s, backward=backward)
    assert result.step_time == pytest.approx(expected, rel=1e-12)
    assert result.bubble_ratio == pytest.approx(formulas.bubble_ratio(p, v, m, s), abs=1e-12)


@given(st.integers(2, 8), st.integers(2, 4), st.integers(1, 8), st.data())
def test_interleaved_holds_what_the_formula_says(p, v, turns, data):
    s = data.draw(st.sampled_from([s for s in range(1, p + 1) if p % s == 0]))
    m = turns * p // s
    live = interleaved(p, v, m, s)
    result = simulate(live, Costs.uniform(live))
    expected = [
        formulas.live_micro_batches(p, m, s, stage, num_chunks=v) * v * s for stage in range(p)
    ]
    assert result.peak_live == pytest.approx(expected)


def recursion(schedule: Schedule, costs: Costs, latency: float) -> dict[tuple[int, Action], float]:
    """Return the end of every computation, each from the ends of what it needs."""
    before = {
        (stage, action): (stage, previous)
        for stage, actions in enumerate(schedule.stages)
        for previous, action in zip((None, *actions), actions, strict=False)
    }
    halves = {event(stage, action): (stage, action) for stage, action in before}

    @cache
    def end(stage: int, action: Action) -> float:
        _, previous = before[stage, action]
        start = end(stage, previous) if previous else 0.0
        for other, need in dependencies(schedule, stage, action):
            extra = 0.0 if other == stage else latency
            start = max(start, end(*halves[other, need]) + extra)
        return start + costs.of(stage, action)

    return {(stage, action): end(stage, action) for stage, action in before}


@st.composite
def random_costs(draw: st.DrawFn, schedule: Schedule) -> Costs:
    random = draw(st.randoms(use_true_random=False))
    return Costs(
        tuple(
            {
                (kind, chunk, j): random.choice([0.5, 1.0, 2.0, 3.25])
                for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
                for chunk in range(schedule.num_chunks)
                for j in range(schedule.num_splits)
            }
            for _ in range(schedule.num_stages)
        )
    )


@settings(max_examples=60)
@given(schedules(largest=4), st.sampled_from([0.0, 0.25, 2.0]), st.data())
def test_every_action_ends_when_a_recursion_says(schedule, latency, data):
    costs = data.draw(random_costs(schedule))
    result = simulate(schedule, costs, Link(latency=latency))
    for (stage, action), end in recursion(schedule, costs, latency).items():
        step = schedule.stages[stage].index(action)
        assert result.ends[stage][step] == end
        assert result.starts[stage][step] == end - costs.of(stage, action)


@settings(max_examples=60)
@given(schedules(largest=6), st.data())
def test_costs_of_every_micro_batch_are_its_own(schedule, data):
    each = [data.draw(random_costs(schedule)) for _ in range(schedule.num_micro_batches)]
    costs = CostsByMicroBatch(tuple(each))
    for one in (schedule, lower(schedule)):
        result = simulate(one, costs)
        for (stage, action), end in recursion(schedule, costs, 0.0).items():
            assert result.ends[stage][one.stages[stage].index(action)] == end


def test_costs_of_packed_documents_are_those_of_their_tokens():
    schedule = one_f_one_b(2, 1, 3)
    packed = PackedCost(TokenCost(linear=5.0, attention=2.0), [Documents((0, 2), 6)] * 2)
    costs = Costs.of_tokens(schedule, packed, (1, 2, 3), flops_per_second=1.0)
    # positions in their documents: 1 | 2, 1 | 2, 3, 4
    forwards = [2 * (5 + 2) / 2, 2 * (10 + 6) / 2, 2 * (15 + 18) / 2]
    for j, forward in enumerate(forwards):
        assert costs.of(0, Action(Kind.F, 0, 0, j)) == forward
        assert costs.of(1, Action(Kind.B, 0, 0, j)) == 2 * forward
        assert costs.of(1, Action(Kind.W, 0, 0, j)) == 2 * 5.0 * (j + 1) / 2


def test_a_micro_batch_without_costs_is_named():
    schedule = one_f_one_b(2, 3)
    costs = CostsByMicroBatch((Costs.uniform(schedule),) * 2)
    with pytest.raises(
        CostError, match=r"no cost is known for 0F2\.0: there are 2 micro-batches of costs"
    ):
        simulate(schedule, costs)


@settings(max_examples=60)
@given(schedules(largest=6))
def test_announcing_receives_costs_no_time_when_transfers_take_none(schedule):
    costs = Costs.uniform(schedule)
    plain, lowered = simulate(schedule, costs), simulate(lower(schedule), costs)
    assert lowered.step_time == pytest.approx(plain.step_time, rel=1e-12)
    assert lowered.busy == pytest.approx(plain.busy)


def test_an_announcement_one_computation_ahead_hides_that_much_latency():
    schedule = gpipe(2, 4)
    costs = Costs.uniform(schedule, forward=1.0, backward=1.0)
    hidden, shown = (
        [
            simulate(each, costs, Link(latency=latency)).step_time
            for each in (schedule, lower(schedule))
        ]
        for latency in (1.0, 1.5)
    )
    assert hidden == [12.0, 12.0]
    assert shown[1] > shown[0] == 13.0


def test_latency_and_bandwidth_delay_what_the_next_stage_starts():
    schedule = one_f_one_b(2, 1, 2)
    link = Link(latency=0.5, bandwidth=10.0, tensor_bytes=(20.0, 5.0))
    result = simulate(schedule, Costs.uniform(schedule, forward=2.0, backward=4.0), link)
    # F0 and F1 take 1 each; tensors of 2.0 and 0.5 seconds follow each other on the link
    assert list(result.starts[1][:2]) == [1.0 + 2.0 + 0.5, 4.5]
    # B1 ends at 7.5, its gradient is there at 8.5; B0 ends at 9.5, its gradient at 12
    assert list(result.starts[0][2:]) == [8.5, 12.0]
    assert result.step_time == 14.0


def test_a_second_tensor_waits_for_the_link():
    schedule = gpipe(2, 2)
    link = Link(bandwidth=1.0, tensor_bytes=(3.0,))
    result = simulate(schedule, Costs.uniform(schedule), link)
    assert list(result.starts[1][:2]) == [1.0 + 3.0, 1.0 + 3.0 + 3.0]


def test_a_send_waits_for_a_late_announcement():
    schedule = lower(gpipe(2, 2))
    late = [action for action in schedule.stages[1] if str(action) != "0RECV_F1.0"]
    late.insert(late.index(Action.parse("0F0.0")) + 1, Action.parse("0RECV_F1.0"))
    schedule = schedule.with_stages((schedule.stages[0], tuple(late)), lowered=True)
    costs = Costs(
        (
            {(Kind.F, 0, 0): 1.0, (Kind.B, 0, 0): 1.0},
            {(Kind.F, 0, 0): 5.0, (Kind.B, 0, 0): 1.0},
        )
    )
    result = simulate(schedule, costs, Link(latency=0.5))
    times = {
        str(action): (start, end)
        for action, start, end in zip(
            schedule.stages[0], result.starts[0], result.ends[0], strict=True
        )
    }
    # issued at 2, announced at 1.5 + 5
    assert times["0SEND_F1.0"] == (2.0, 7.0)
    received = schedule.stages[1].index(Action.parse("0RECV_F1.0"))
    assert (result.starts[1][received], result.ends[1][received]) == (6.5, 7.0)


def test_split_backwards_cost_half_each():
    schedule = Schedule(
        "split", 1, 1, 1, 1, (tuple(map(Action.parse, ["0F0.0", "0I0.0", "0W0.0"])),)
    )
    result = simulate(schedule, Costs.uniform(schedule, forward=1.0, backward=3.0))
    assert list(result.ends[0]) == [1.0, 2.5, 4.0]
    assert result.bubble_ratio == 0.0


def test_costs_from_tokens_make_equal_cuts_unequal_and_uniform_comp_better():
    cost = TokenCost.of_transformer(num_layers=8, hidden_size=512, num_attention_heads=8)
    schedule = one_f_one_b(4, 4, 4)

    def step_time(lengths: tuple[int, ...]) -> float:
        costs = Costs.of_tokens(schedule, cost, lengths, flops_per_second=1e12)
        return simulate(schedule, costs).step_time

    even = step_time(partition(32768, 4))
    balanced = step_time(partition(32768, 4, method="uniform_comp", cost=cost))
    work = 4 * 3 * cost.of(0, 32768) / (4 * 1e12)
    assert balanced == pytest.approx(work / (1 - formulas.bubble_ratio(4, 1, 4, 4)), rel=1e-3)
    assert even > 1.03 * balanced


def test_measured_costs_are_means_over_micro_batches():
    schedule = one_f_one_b(2, 3, 2)
    truth = simulate(schedule, Costs.uniform(schedule, forward=2.0, backward=3.0))
    stages = [
        [Span(*entry) for entry in zip(actions, starts, ends, strict=True)]
        for actions, starts, ends in zip(schedule.stages, truth.starts, truth.ends, strict=True)
    ]
    costs = Costs.measured(stages)
    assert costs.of(1, Action.parse("0B2.1")) == pytest.approx(1.5)
    assert simulate(schedule, costs).step_time == pytest.approx(truth.step_time)
    whole = costs.merged(1, 1)
    plain = one_f_one_b(2, 3)
    assert simulate(plain, whole).step_time == pytest.approx(
        formulas.step_time(2, 1, 3, 1, forward=2.0, backward=3.0)
    )


def test_what_was_not_measured_of_a_backward_is_filled_in():
    schedule = zb_h1(2, 3)
    truth = simulate(schedule, thirds(schedule, 1.0, 3.0, 2.0))
    stages = [
        [Span(*entry) for entry in zip(actions, starts, ends, strict=True)]
        for actions, starts, ends in zip(schedule.stages, truth.starts, truth.ends, strict=True)
    ]
    measured = Costs.measured(stages)
    costs = measured.completed()
    times = [
        [costs.of(stage, Action(k, 0, 0, 0)) for k in (Kind.B, Kind.I, Kind.W)] for stage in (0, 1)
    ]
    assert times == [[pytest.approx(5.0), 2.5, 2.5], [5.0, 3.0, 2.0]]
    assert costs.total(Kind.F) == pytest.approx(1.0)
    assert costs.total(Kind.W) == pytest.approx(2.25)
    with pytest.raises(CostError, match=r"no cost is known for 0B0\.0 on stage 1"):
        simulate(one_f_one_b(2, 3), measured)


def test_one_stage_may_split_some_backwards_and_not_others():
    stages = (("0F0.0", "0F1.0", "0B0.0", "0I1.0", "0W1.0"),) * 2
    schedule = gpipe(2, 2).with_stages(
        tuple(tuple(map(Action.parse, actions)) for actions in stages), lowered=False
    )
    result = simulate(schedule, thirds(schedule, 1.0, 2.0, 3.0))
    assert list(result.starts[1]) == [1.0, 2.0, 3.0, 8.0, 10.0]
    assert list(result.starts[0]) == [0.0, 1.0, 8.0, 13.0, 15.0]


def test_a_million_actions_take_seconds():
    schedule = one_f_one_b(8, 1250, 10)
    num_actions = sum(map(len, schedule.stages))
    start = time.process_time()
    result = simulate(schedule, Costs.uniform(schedule))
    seconds = time.process_time() - start
    assert result.step_time == pytest.approx(formulas.step_time(8, 1, 1250, 10))
    assert seconds / num_actions < 10 / 1_000_000


def test_a_schedule_that_cannot_end_is_refused():
    schedule = one_f_one_b(2, 2)
    backwards_first = tuple(reversed(schedule.stages[0]))
    broken = schedule.with_stages((backwards_first, schedule.stages[1]), lowered=False)
    with pytest.raises(ScheduleError, match=r"stage 0, step 0, 0B1\.0: waits for 0F1\.0"):
        simulate(broken, Costs.uniform(schedule))


def test_a_missing_cost_is_named():
    schedule = one_f_one_b(2, 2, 2)
    with pytest.raises(CostError, match=r"no cost is known for 0F0\.1 on stage 0"):
        simulate(schedule, Costs.uniform(one_f_one_b(2, 2)))
    with pytest.raises(CostError, match=r"no cost is known for 0F0\.0 on stage 1"):
        simulate(one_f_one_b(2, 2), Costs.uniform(one_f_one_b(1, 2)))


def test_lengths_must_be_as_many_as_sub_sequences():
    cost = TokenCost(linear=1.0, attention=1.0)
    with pytest.raises(CostError, match="3 lengths for 2 sub-sequences"):
        Costs.of_tokens(one_f_one_b(2, 2, 2), cost, (1, 2, 3), flops_per_second=1.0)


def test_an_infinitely_fast_link_takes_no_time():
    assert Link(tensor_bytes=(1e9,)).transfer(0) == 0.0
    assert math.isinf(Link().bandwidth)
