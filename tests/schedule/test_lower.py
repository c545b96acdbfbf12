"""Where sends and receives go."""

import pytest
from hypothesis import given, settings

from seq1f1b.schedule import (
    Action,
    Kind,
    ScheduleError,
    forward_only,
    gpipe,
    interleaved,
    lower,
    one_f_one_b,
    validate,
)
from tests.schedule.shapes import schedules


@settings(max_examples=60)
@given(schedules())
def test_a_tensor_is_sent_right_after_it_is_computed(schedule):
    lowered = lower(schedule)
    for actions in lowered.stages:
        computed = None
        for action in actions:
            if action.kind.is_compute:
                computed = action
            elif action.kind.is_send:
                made_by = (Kind.F,) if action.kind is Kind.SEND_F else (Kind.B, Kind.I)
                assert computed in [action.of_kind(kind) for kind in made_by]


@settings(max_examples=60)
@given(schedules())
def test_a_receive_is_announced_at_least_one_computation_ahead(schedule):
    for actions in lower(schedule).stages:
        computed = 0
        announced: dict[Action, int] = {}
        for action in actions:
            if action.kind.is_receive:
                announced[action] = computed
            elif action.kind.is_compute:
                receive = Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B
                if (at := announced.get(action.of_kind(receive))) is not None:
                    assert computed == 0 or computed - at >= 1
                computed += 1


@settings(max_examples=60)
@given(schedules())
def test_every_edge_between_stages_becomes_one_transfer(schedule):
    lowered = lower(schedule)
    num_parts = schedule.num_micro_batches * schedule.num_splits
    trains = any(action.kind in (Kind.B, Kind.I) for action in schedule.stages[0])
    edges = (schedule.num_stages * schedule.num_chunks - 1) * num_parts * (2 if trains else 1)
    kinds = [action.kind for actions in lowered.stages for action in actions]
    assert sum(kind.is_send for kind in kinds) == edges
    assert sum(kind.is_receive for kind in kinds) == edges


def test_plain_1f1b_announces_exactly_one_computation_ahead():
    assert str(lower(one_f_one_b(2, 2))) == (
        "0F0.0 0RECV_B0.0 0SEND_F0.0 0F1.0 0RECV_B1.0 0SEND_F1.0 0B0.0 0B1.0\n"
        "0RECV_F0.0 0F0.0 0RECV_F1.0 0B0.0 0SEND_B0.0 0F1.0 0B1.0 0SEND_B1.0"
    )


def test_long_turns_announce_when_the_tensor_is_there():
    """Stage 1 sends its first tensor back to stage 0 at time 2, long before it is used."""
    actions = lower(interleaved(2, 2, 8, group=8)).stages[0]
    assert actions.index(Action.parse("1RECV_F0.0")) < actions.index(Action.parse("0F2.0"))


def test_one_stage_has_nobody_to_send_to():
    assert lower(gpipe(1, 3, 2)).stages == gpipe(1, 3, 2).stages
    assert lower(forward_only(1, 1, 2)).stages == forward_only(1, 1, 2).stages


def test_computations_that_wait_for_each_other_are_refused():
    schedule = one_f_one_b(2, 2)
    backwards_first = tuple(reversed(schedule.stages[0]))
    broken = schedule.with_stages((backwards_first, schedule.stages[1]), lowered=False)
    with pytest.raises(ScheduleError, match=r"stage 0, step 0, 0B1\.0: waits for 0F1\.0"):
        lower(broken)


def test_tensors_that_are_used_in_another_order_than_they_arrive_are_announced_as_they_arrive():
    """Stage 1 is idle when both have come, and then takes the later one first."""
    stages = (("0F0.0", "0F1.0", "0B1.0", "0B0.0"), ("0F1.0", "0F0.0", "0B1.0", "0B0.0"))
    schedule = gpipe(2, 2).with_stages(
        tuple(tuple(map(Action.parse, actions)) for actions in stages), lowered=False
    )
    lowered = lower(schedule)
    validate(lowered)
    assert [str(action) for action in lowered.stages[1][:2]] == ["0RECV_F0.0", "0RECV_F1.0"]
