"""The greedy schedule is right, fits its cap and is the fastest under it."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq1f1b.schedule import (
    Kind,
    Schedule,
    gpipe,
    interleaved,
    lower,
    one_f_one_b,
    peak_live,
    validate,
    zb_h1,
)
from seq1f1b.simulate import CostError, Costs, Link, formulas, greedy, simulate

STAGES = st.integers(1, 8)
CHUNKS = st.integers(1, 4)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Schedule, Costs, Link, int]:
    """Draw a plain schedule of some shape, unequal costs and links for it, and a memory cap."""
    p, v, m, s = draw(STAGES), draw(CHUNKS), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    like = interleaved(p, v if p > 1 else 1, m, s)
    random = draw(st.randoms(use_true_random=False))
    costs = Costs(
        tuple(
            {
                (kind, chunk, j): random.choice([0.5, 1.0, 1.25, 3.0])
                for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
                for chunk in range(like.num_chunks)
                for j in range(s)
            }
            for _ in range(p)
        )
    )
    link = Link(
        latency=draw(st.sampled_from([0.0, 0.3])),
        bandwidth=1.0,
        tensor_bytes=(draw(st.sampled_from([0.0, 0.2])),) * s,
    )
    needed = like.num_chunks * s
    cap = draw(st.integers(needed, needed + max(peak_live(like))))
    return like, costs, link, cap


@settings(max_examples=60, deadline=None)
@given(problems())
def test_it_fits_the_cap_and_no_closed_form_that_fits_is_faster(problem):
    like, costs, link, cap = problem
    sizes = (like.num_stages, like.num_micro_batches, like.num_splits)
    found = greedy(sizes[0], like.num_chunks, *sizes[1:], costs, link, max_live=cap)
    validate(found, max_live=cap)
    validate(lower(found), max_live=cap)
    step = simulate(found, costs, link).step_time
    rivals = [like]
    if like.num_chunks == 1:
        rivals += [gpipe(*sizes), zb_h1(*sizes), one_f_one_b(*sizes)]
    for rival in rivals:
        if max(peak_live(rival)) <= cap:
            assert step <= simulate(rival, costs, link).step_time * (1 + 1e-8)
    assert greedy(sizes[0], like.num_chunks, *sizes[1:], costs, link, max_live=cap) == found


@pytest.mark.parametrize("p, v, m, s", [(4, 1, 8, 1), (8, 1, 8, 4), (4, 2, 8, 1), (8, 2, 8, 4)])
def test_with_equal_costs_only_the_wait_for_the_first_forward_is_left(p, v, m, s):
    like = interleaved(p, v, m, s)
    costs = Costs.uniform(like)
    step = simulate(greedy(p, v, m, s, costs), costs).step_time
    assert step == pytest.approx(3 * m + (p - 1) / (v * s))
    assert step < formulas.step_time(p, v, m, s)


def test_it_takes_the_memory_of_1f1b_unless_told_otherwise():
    like = one_f_one_b(4, 8, 4)
    costs = Costs.of_forwards(like, [1.0, 1.5, 2.0, 2.5], backward_ratio=2.0)
    plain = greedy(4, 1, 8, 4, costs)
    assert max(peak_live(plain)) <= 7 == peak_live(like)[0]
    roomy = greedy(4, 1, 8, 4, costs, max_live=12)
    shaped = greedy(4, 1, 8, 4, costs, max_live=(12, 10, 8, 6))
    assert all(a <= b for a, b in zip(peak_live(shaped), (12, 10, 8, 6), strict=True))
    times = [simulate(each, costs).step_time for each in (like, plain, roomy)]
    assert times[0] > 1.05 * times[1] > 1.05 * times[2]


def test_backwards_stay_whole_where_splitting_costs_more():
    like = one_f_one_b(2, 4)
    parts = {(Kind.F, 0, 0): 1.0, (Kind.B, 0, 0): 2.0, (Kind.I, 0, 0): 1.8, (Kind.W, 0, 0): 1.8}
    found = greedy(2, 1, 4, 1, Costs((parts, parts)))
    assert found.stages == like.stages


@pytest.mark.parametrize(
    "sizes, max_live, message",
    [
        ((2, 1, 4, 4), 3, "a cap of 3 sub-sequences does not hold one micro-batch, which has 4"),
        ((2, 2, 4, 4), (9, 7), "a cap of 7 .* has 8 on a stage \\(4 on each of 2 chunks\\)"),
        ((1, 2, 4, 1), 9, "2 model chunks on one stage: interleaving needs 2 stages"),
        ((2, 1, 4, 1), (4, 4, 4), "3 memory caps for 2 stages"),
    ],
)
def test_what_cannot_be_is_refused(sizes, max_live, message):
    costs = Costs.uniform(one_f_one_b(2, 4, sizes[3]))
    with pytest.raises(ValueError, match=message):
        greedy(*sizes, costs, max_live=max_live)


def test_a_missing_cost_is_named():
    parts = {(Kind.F, 0, 0): 1.0, (Kind.B, 0, 0): 2.0}
    with pytest.raises(CostError, match=r"no cost is known for 0I0\.0 on stage 0"):
        greedy(2, 1, 4, 1, Costs((parts, parts)))


def test_a_large_step_takes_seconds():
    like = interleaved(8, 2, 32, 8)
    costs = Costs.of_forwards(like, [1 + 0.1 * j for j in range(8)], backward_ratio=2.0)
    start = time.process_time()
    found = greedy(8, 2, 32, 8, costs)
    assert time.process_time() - start < 20
    assert simulate(found, costs).step_time < simulate(like, costs).step_time
