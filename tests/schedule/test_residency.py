"""Model chunks that visit the device: how often, where, and what is refused."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq1f1b.schedule import (
    Action,
    Kind,
    Plan,
    Schedule,
    ScheduleError,
    forward_only,
    interleaved,
    lower,
    num_loads,
    validate,
    visiting,
    zb_h1,
)
from seq1f1b.sequence import sub_sequences
from seq1f1b.simulate import Costs, simulate


def offloaded(
    stages: int, chunks: int, units: int, splits: int, slots: int, *, turns=1, prefetch=False
) -> Schedule:
    """Return a schedule of ``turns`` turns of ``units`` micro-batches each."""
    group = max(stages, units * splits)
    plain = interleaved(stages, chunks, units * turns, splits, group=group)
    return visiting(lower(plain), slots, prefetch=prefetch)


def loads(schedule: Schedule) -> list[int]:
    return [sum(a.kind.is_load for a in actions) for actions in schedule.stages]


SHAPES = st.tuples(st.integers(2, 4), st.integers(2, 8), st.integers(1, 5), st.integers(1, 4))


@given(SHAPES, st.integers(1, 8), st.booleans())
def test_one_turn_loads_as_often_as_the_formula_says(shape, slots, prefetch):
    slots = min(slots, shape[1])
    schedule = offloaded(*shape, slots, prefetch=prefetch)
    validate(schedule)
    assert loads(schedule) == [num_loads(shape[1], slots)] * shape[0]
    assert schedule.slots == (tuple(c % slots for c in range(shape[1])),) * shape[0]


@settings(max_examples=30)
@given(SHAPES, st.integers(2, 4), st.integers(2, 4), st.booleans())
def test_several_turns_load_at_most_twice_more(shape, slots, turns, prefetch):
    stages, chunks, units, splits = shape
    slots, units = min(slots, chunks), max(units, stages + 1)
    schedule = offloaded(stages, chunks, units, splits, slots, turns=turns, prefetch=prefetch)
    validate(schedule)
    expected = num_loads(chunks, slots, turns)
    assert all(expected <= number <= expected + 2 for number in loads(schedule))


@pytest.mark.parametrize(
    "chunks, slots, turns, expected", [(4, 2, 1, 6), (4, 1, 1, 7), (8, 2, 1, 14), (4, 2, 3, 14)]
)
def test_the_formula(chunks, slots, turns, expected):
    assert num_loads(chunks, slots, turns) == expected


@settings(max_examples=30)
@given(SHAPES, st.integers(1, 3), st.booleans())
def test_gradients_leave_once_in_one_turn_and_nothing_computed_is_changed(shape, slots, prefetch):
    slots = min(slots, shape[1])
    schedule = offloaded(*shape, slots, prefetch=prefetch)
    for stage, actions in enumerate(schedule.stages):
        left = Counter(a.chunk for a in actions if a.kind is Kind.FREE_B)
        assert left == dict.fromkeys(range(shape[1]), 1)
        others = [a for a in actions if not (a.kind.is_load or a.kind.is_free)]
        plain = lower(interleaved(*shape, group=max(shape[0], shape[2] * shape[3])))
        assert tuple(others) == plain.stages[stage]


def test_prefetch_loads_as_early_as_the_slot_is_free():
    late, early = offloaded(2, 4, 4, 1, 2), offloaded(2, 4, 4, 1, 2, prefetch=True)
    for before, after in zip(late.stages, early.stages, strict=True):
        assert Counter(before) == Counter(after)
        for load in (a for a in after if a.kind.is_load):
            place = after.index(load)
            assert place <= before.index(load)
            assert place < 2 or after[place - 1].kind.is_free


def test_evaluation_loads_each_chunk_once():
    schedule = visiting(lower(forward_only(2, 4, 6, 2, group=12)), 2)
    validate(schedule)
    assert loads(schedule) == [4, 4]
    assert not any(a.kind is Kind.FREE_B for actions in schedule.stages for a in actions)


def test_visits_are_printed_parsed_and_kept_in_a_file(tmp_path):
    schedule = offloaded(2, 4, 3, 2, 2)
    action = Action(Kind.LOAD_B, 3, 1, 0)
    assert str(action) == "3LOAD_B1.0"
    assert Action.parse("3LOAD_B1.0") == action
    plan = Plan(schedule, (sub_sequences([4, 4]),) * 3)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert "2 on the device at a time" in schedule.describe()


@given(SHAPES, st.integers(1, 3), st.booleans(), st.data())
def test_a_visit_that_is_dropped_doubled_moved_or_renamed_is_refused(shape, slots, prefetch, data):
    schedule = offloaded(*shape, min(slots, shape[1]), prefetch=prefetch)
    stage = data.draw(st.integers(0, shape[0] - 1))
    actions = list(schedule.stages[stage])
    places = [i for i, a in enumerate(actions) if a.kind.is_load or a.kind.is_free]
    place = data.draw(st.sampled_from(places))
    action = actions.pop(place)
    how = data.draw(st.sampled_from(["drop", "double", "move", "rename"]))
    of_chunk = [i for i, a in enumerate(actions) if a.chunk == action.chunk and a.kind.is_compute]
    if how == "double":
        other = next(a for a in actions if a.kind is action.kind or a.kind.is_compute)
        actions[place:place] = [action, action._replace(micro_batch=other.micro_batch)]
    elif how == "move":  # a load behind what needs it, a free before what it follows
        behind = [i for i in of_chunk if i >= place] or [len(actions) - 1]
        before = [i for i in of_chunk if i < place] or [0]
        actions.insert(behind[0] + 1 if action.kind.is_load else before[-1], action)
    elif how == "rename":
        other_kind = {
            Kind.LOAD_F: Kind.FREE_F,
            Kind.LOAD_B: Kind.FREE_B,
            Kind.FREE_F: Kind.FREE_B,
            Kind.FREE_B: Kind.FREE_F,
        }
        actions.insert(place, action.of_kind(other_kind[action.kind]))
    stages = (*schedule.stages[:stage], tuple(actions), *schedule.stages[stage + 1 :])
    with pytest.raises(ScheduleError):
        validate(replace(schedule, stages=stages))


def test_two_chunks_in_one_slot_and_slots_over_the_cap_are_refused():
    schedule = offloaded(2, 4, 4, 1, 2, prefetch=True)
    with pytest.raises(ScheduleError, match="chunk 0 is still in slot 0"):
        validate(replace(schedule, slots=((0, 0, 1, 1), (0, 1, 0, 1))))
    with pytest.raises(ScheduleError, match="slot 2 of 2"):
        validate(replace(schedule, slots=((0, 1, 2, 1), (0, 1, 0, 1))))
    with pytest.raises(ScheduleError, match="stay on the device"):
        validate(replace(schedule, slots=None, num_slots=None))


@pytest.mark.parametrize(
    "schedule, slots, complaint",
    [
        (interleaved(2, 4, 4), 2, "lowered"),
        (lower(zb_h1(2, 4)), 1, "splits backwards"),
        (lower(interleaved(2, 4, 4)), 5, "from 1 to 4"),
        (lower(interleaved(2, 4, 4)), 0, "from 1 to 4"),
    ],
)
def test_what_cannot_visit_is_refused(schedule, slots, complaint):
    with pytest.raises(ValueError, match=complaint):
        visiting(schedule, slots)


def test_a_schedule_with_loads_is_not_timed_without_their_cost():
    plain = lower(interleaved(2, 4, 4))
    costs = Costs.of_forwards(plain, [1.0], backward_ratio=2.0)
    with pytest.raises(ValueError, match="loads model chunks"):
        simulate(visiting(plain, 2), costs)
