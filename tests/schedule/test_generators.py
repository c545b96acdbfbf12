"""Every generator is valid at every size, and has the order and memory that theory gives it."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from seq1f1b.schedule import (
    Action,
    Kind,
    Schedule,
    forward_only,
    gpipe,
    interleaved,
    lower,
    one_f_one_b,
    peak_live,
    validate,
    zb_h1,
)
from tests.schedule.shapes import CHUNKS, MICRO_BATCHES, SPLITS, STAGES, schedules

SEVERAL_STAGES = st.integers(2, 8)
SEVERAL_CHUNKS = st.integers(2, 4)


@settings(max_examples=150)
@given(schedules())
def test_every_schedule_is_valid_as_computations_and_with_sends_that_block(schedule):
    validate(schedule)
    lowered = lower(schedule)
    validate(lowered)
    assert lower(lowered) is lowered
    computations = [[a for a in actions if a.kind.is_compute] for actions in lowered.stages]
    assert computations == [list(actions) for actions in schedule.stages]


@given(STAGES, MICRO_BATCHES, SPLITS)
def test_seq1f1b_warms_up_with_as_many_forwards_as_the_paper_says(p, m, s):
    for stage, actions in enumerate(one_f_one_b(p, m, s).stages):
        kinds = [action.kind for action in actions]
        warmup = min(p - stage - 2 + s, m * s)
        # one forward and one backward in turn follow, then the backwards that are left
        steady = [Kind.F, Kind.B] * (m * s - warmup)
        assert kinds == [Kind.F] * warmup + steady + [Kind.B] * warmup


@given(STAGES, MICRO_BATCHES, SPLITS)
def test_seq1f1b_holds_as_many_sub_sequences_as_the_paper_says(p, m, s):
    expected = [min(p - stage + s - 1, m * s) for stage in range(p)]
    assert list(peak_live(one_f_one_b(p, m, s))) == expected


@given(STAGES, MICRO_BATCHES, SPLITS)
def test_gpipe_holds_everything(p, m, s):
    assert set(peak_live(gpipe(p, m, s))) == {m * s}


@given(STAGES, MICRO_BATCHES, SPLITS, st.none() | st.integers(0, 8))
def test_zb_h1_holds_what_1f1b_does_and_the_weight_gradients_that_it_defers(p, m, s, most):
    schedule = zb_h1(p, m, s, most)
    for stage, live in enumerate(peak_live(schedule)):
        deferred = stage if most is None else min(stage, most)
        assert live == min(p - stage + s - 1 + deferred, m * s)
    assert max(peak_live(zb_h1(p, m, s))) == peak_live(one_f_one_b(p, m, s))[0]


@given(STAGES, MICRO_BATCHES, SPLITS)
def test_zb_h1_passes_gradients_on_in_1f1bs_order_and_ends_with_weight_gradients(p, m, s):
    plain = one_f_one_b(p, m, s)
    for stage, (actions, whole) in enumerate(zip(zb_h1(p, m, s).stages, plain.stages, strict=True)):
        passed = [a.of_kind(Kind.B) if a.kind is Kind.I else a for a in actions]
        assert tuple(a for a in passed if a.kind is not Kind.W) == whole
        last = min(stage + 1, m * s) if stage else 0
        assert {a.kind for a in actions[len(actions) - last :]} <= {Kind.W}


def test_a_negative_number_of_deferred_weight_gradients_is_refused():
    with pytest.raises(ValueError, match="-1 deferred weight gradients: it must be 0 or more"):
        zb_h1(2, 4, max_deferred=-1)


@given(STAGES, MICRO_BATCHES)
def test_with_one_split_it_is_megatrons_1f1b(p, m):
    for stage, actions in enumerate(one_f_one_b(p, m).stages):
        warmup = megatron_warmup(p, stage, m, None, None)
        forwards = [Action(Kind.F, 0, k, 0) for k in range(m)]
        backwards = [Action(Kind.B, 0, k, 0) for k in range(m)]
        assert list(actions) == megatron_order(forwards, backwards, warmup)


@given(SEVERAL_STAGES, SEVERAL_CHUNKS, st.data())
def test_with_one_split_interleaving_is_megatrons(p, v, data):
    """At every group size and number of micro-batches that Megatron-Core accepts."""
    group = data.draw(st.integers(p, 3 * p))
    left_over = data.draw(st.sampled_from([0, *range(p, group)]))
    m = group * data.draw(st.integers(1, 4)) + left_over
    table = get_schedule_table(m, v, group)
    forwards = [Action(Kind.F, chunk, k, 0) for k, chunk in table]
    backwards = [Action(Kind.B, v - 1 - chunk, k, 0) for k, chunk in table]
    for stage, actions in enumerate(interleaved(p, v, m, group=group).stages):
        warmup = megatron_warmup(p, stage, m, v, group)
        assert list(actions) == megatron_order(forwards, backwards, warmup)


@given(SEVERAL_STAGES, SEVERAL_CHUNKS, MICRO_BATCHES, st.data())
def test_seq1f1b_interleaved_warms_up_with_as_many_forwards_as_theory_says(p, v, m, data):
    """(v - 1) p + 2 (p - i - 1) + s - 1 of them where whole micro-batches fill turns of p."""
    s = data.draw(st.sampled_from([s for s in range(1, p + 1) if p % s == 0]))
    schedule = interleaved(p, v, m * p // s, s)
    total = v * m * p
    for stage, actions in enumerate(schedule.stages):
        expected = min((v - 1) * p + 2 * (p - stage - 1) + s - 1, total)
        kinds = [action.kind for action in actions]
        forwards_first = kinds.index(Kind.B)
        assert forwards_first == min(expected + 1, total)
        assert set(kinds[-expected:]) == {Kind.B}


@given(SEVERAL_STAGES, SEVERAL_CHUNKS, MICRO_BATCHES, SPLITS)
def test_turns_of_a_group_take_whole_micro_batches_through_a_chunk(p, v, m, s):
    for actions in interleaved(p, v, m, s).stages:
        for kind in (Kind.F, Kind.B):
            parts = [action for action in actions if action.kind is kind]
            ends = [i for i in range(1, len(parts)) if parts[i].chunk != parts[i - 1].chunk]
            assert all(end % s == 0 for end in ends)


def test_one_chunk_interleaved_is_plain():
    assert interleaved(4, 1, 8, 2) == one_f_one_b(4, 8, 2)


def test_interleaving_on_one_stage_is_refused():
    with pytest.raises(ValueError, match="2 model chunks on one stage: interleaving needs 2"):
        interleaved(1, 2, 4)


def test_turns_shorter_than_the_pipeline_are_refused():
    with pytest.raises(ValueError, match="turns of 3 on 4 stages: a turn takes at least one"):
        interleaved(4, 2, 8, group=3)


@given(STAGES, CHUNKS, MICRO_BATCHES, SPLITS)
def test_evaluation_runs_each_forward_once(p, v, m, s):
    for actions in forward_only(p, v, m, s).stages:
        assert {action.kind for action in actions} == {Kind.F}
        assert len(set(actions)) == len(actions) == v * m * s


def test_names_tell_the_schedules_apart():
    made: list[Schedule] = [
        gpipe(2, 4),
        one_f_one_b(2, 4),
        one_f_one_b(2, 4, 2),
        interleaved(2, 2, 4),
        interleaved(2, 2, 4, 2),
        zb_h1(2, 4),
        zb_h1(2, 4, 2),
        forward_only(2, 1, 4),
    ]
    assert [schedule.name for schedule in made] == [
        "gpipe",
        "1f1b",
        "seq1f1b",
        "1f1b-interleaved",
        "seq1f1b-interleaved",
        "zb-h1",
        "seq1f1b-zb-h1",
        "forward-only",
    ]


def megatron_warmup(p: int, stage: int, m: int, v: int | None, group: int | None) -> int:
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: p, rank=lambda: stage),
        virtual_pipeline_model_parallel_size=v,
    )
    counts = get_pp_rank_microbatches(m, v or 1, group, p2p_communicator=communicator)
    return min(counts[2], m * (v or 1)) if p > 1 else 0


def megatron_order(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """Lay out Megatron-Core's three loops: warm-up, one forward one backward, cool-down."""
    order = forwards[:warmup]
    for k in range(len(forwards) - warmup):
        order += [forwards[warmup + k], backwards[k]]
    return order + backwards[len(forwards) - warmup :]
