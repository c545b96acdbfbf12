"""A schedule that breaks a rule is refused, and told what is missing where.

``breaks_a_rule`` is a second opinion on every mutated schedule: a graph of all orders and
dependencies, written down anew from the definition, and the standard library's search for a cycle.
"""

import re
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seq1f1b.schedule import (
    Action,
    Kind,
    Schedule,
    ScheduleError,
    gpipe,
    lower,
    one_f_one_b,
    peak_live,
    validate,
)
from tests.schedule.shapes import GENERATORS, schedules

Node = tuple[int, Action]


def kinds_of_parts(actions: tuple[Action, ...]) -> dict[tuple[int, ...], list[Kind]]:
    kinds = defaultdict(list)
    for action in actions:
        if action.kind.is_compute:
            kinds[tuple(action[1:])].append(action.kind)
    return kinds


def breaks_a_rule(schedule: Schedule) -> bool:
    """Tell whether a lowered training schedule is incomplete, crossed or circular."""
    p, v = schedule.num_stages, schedule.num_chunks
    expected = {
        (c, m, j)
        for c in range(v)
        for m in range(schedule.num_micro_batches)
        for j in range(schedule.num_splits)
    }
    transfers: dict[tuple[int, int, bool], tuple[list[Node], list[Node]]]
    transfers = defaultdict(lambda: ([], []))
    trains = any(a.kind in (Kind.B, Kind.I) for actions in schedule.stages for a in actions)
    graph: dict[Node, set[Node]] = {}
    handed_on: list[dict[tuple[int, ...], Kind]] = []
    for stage, actions in enumerate(schedule.stages):
        kinds = kinds_of_parts(actions)
        allowed = ([Kind.B, Kind.F], [Kind.F, Kind.I, Kind.W], [] if trains else [Kind.F])
        if kinds.keys() != expected or any(sorted(have) not in allowed for have in kinds.values()):
            return True
        handed_on.append(
            {part: Kind.I if Kind.I in have else Kind.B for part, have in kinds.items()}
        )
        for before, action in zip((None, *actions), actions, strict=False):
            needs: set[Node] = {(stage, before)} if before else set()
            forward = action.kind in (Kind.F, Kind.SEND_F, Kind.RECV_F)
            place = action.chunk * p + stage
            kind, c, m, j = action
            # who waits for a gradient waits for whatever hands it on
            if kind is Kind.W:
                needs.add((stage, action.of_kind(Kind.I)))
            elif kind.is_compute:
                from_place = place - 1 if forward else place + 1
                if 0 <= from_place < p * v:
                    receive = action.of_kind(Kind.RECV_F if forward else Kind.RECV_B)
                    sent = Action(Kind.SEND_F if forward else Kind.SEND_B, from_place // p, m, j)
                    needs |= {(stage, receive), (from_place % p, sent)}
                if forward and j > 0:
                    needs.add((stage, action._replace(sub_sequence=j - 1)))
                if not forward:
                    needs.add((stage, action.of_kind(Kind.F)))
                    if j < schedule.num_splits - 1:
                        later = action._replace(sub_sequence=j + 1)
                        needs.add((stage, later.of_kind(handed_on[stage][c, m, j + 1])))
            else:
                goes_down = forward == kind.is_send
                other = place + (1 if goes_down else -1)
                if not 0 <= other < p * v:
                    return True
                end = action._replace(chunk=other // p)
                if kind.is_send:
                    made_by = Kind.F if forward else handed_on[stage][c, m, j]
                    needs.add((stage, action.of_kind(made_by)))
                    needs.add((other % p, end.of_kind(Kind.RECV_F if forward else Kind.RECV_B)))
                    transfers[stage, other % p, forward][0].append((other % p, end.of_kind(Kind.F)))
                else:
                    transfers[other % p, stage, forward][1].append((stage, action.of_kind(Kind.F)))
            graph[stage, action] = needs
    if any(sent != received for sent, received in transfers.values()):
        return True
    if any(need not in graph for needs in graph.values() for need in needs):
        return True
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return True
    return False


def with_stage(schedule: Schedule, stage: int, actions: list[Action]) -> Schedule:
    stages = list(schedule.stages)
    stages[stage] = tuple(actions)
    return schedule.with_stages(tuple(stages), lowered=schedule.lowered)


@st.composite
def mutations(draw: st.DrawFn) -> Schedule:
    """Draw a lowered training schedule with one mistake made in one stage."""
    schedule = lower(draw(schedules(trains=True, largest=4)))
    stage = draw(st.integers(0, schedule.num_stages - 1))
    actions = list(schedule.stages[stage])
    first = draw(st.integers(0, len(actions) - 1))
    second = draw(st.integers(0, len(actions) - 1))
    match draw(st.sampled_from(["swap", "neighbours", "drop", "duplicate", "move", "replace"])):
        case "swap":
            actions[first], actions[second] = actions[second], actions[first]
        case "neighbours":
            first = min(first, len(actions) - 2)
            actions[first : first + 2] = actions[first : first + 2][::-1]
        case "drop":
            del actions[first]
        case "duplicate":
            actions.insert(second, actions[first])
        case "move":
            actions.insert(second, actions.pop(first))
        case "replace":
            actions[first] = actions[second]
    return with_stage(schedule, stage, actions)


@settings(max_examples=250)
@given(mutations())
def test_the_validator_refuses_exactly_what_breaks_a_rule(mutated):
    if breaks_a_rule(mutated):
        message = refusal(mutated)
        assert re.search(r"\bstage \d+\b", message)
        assert re.search(r"\d(F|B|I|W|SEND_F|SEND_B|RECV_F|RECV_B)\d+\.\d", message)
    else:
        validate(mutated)


@settings(max_examples=30)
@given(schedules(trains=True))
def test_the_second_opinion_finds_nothing_wrong_with_what_the_generators_make(schedule):
    assert not breaks_a_rule(lower(schedule))


def swap(schedule: Schedule, stage: int, one: str, other: str) -> Schedule:
    exchange = {Action.parse(one): Action.parse(other), Action.parse(other): Action.parse(one)}
    actions = [exchange.get(action, action) for action in schedule.stages[stage]]
    return with_stage(schedule, stage, actions)


def refusal(schedule: Schedule, max_live: int | None = None) -> str:
    with pytest.raises(ScheduleError) as error:
        validate(schedule, max_live=max_live)
    return str(error.value)


def test_a_stage_without_any_backward_is_not_taken_for_an_evaluation():
    schedule = gpipe(2, 1, 1)
    forwards = [action for action in schedule.stages[0] if action.kind is Kind.F]
    message = refusal(with_stage(schedule, 0, forwards))
    assert "stage 0 needs exactly one F and one B (or I and W) of 0F0.0; it has F" in message


def test_forwards_of_sub_sequences_out_of_order_lack_the_keys_of_the_earlier():
    schedule = swap(one_f_one_b(2, 2, 2), 0, "0F0.0", "0F0.1")
    assert "stage 0, step 0, 0F0.1: waits for 0F0.0 on stage 0" in refusal(schedule)


def test_backwards_of_sub_sequences_out_of_order_lack_the_gradients_of_the_later():
    schedule = swap(one_f_one_b(2, 2, 2), 1, "0B0.0", "0B0.1")
    assert "stage 1, step 2, 0B0.0: waits for 0B0.1 on stage 1" in refusal(schedule)


@pytest.mark.parametrize("kind", [Kind.F, Kind.B])
@pytest.mark.parametrize("name", sorted(GENERATORS.keys() - {"forward_only"}))
def test_reversed_sub_sequences_are_refused_even_if_every_stage_reverses_them(name, kind):
    schedule = GENERATORS[name](3, 2, 4, 3)
    last = schedule.num_splits - 1

    def reverse(action: Action) -> Action:
        if action.kind is kind or (kind is Kind.B and action.kind in (Kind.I, Kind.W)):
            return action._replace(sub_sequence=last - action.sub_sequence)
        return action

    stages = tuple(tuple(map(reverse, actions)) for actions in schedule.stages)
    message = refusal(schedule.with_stages(stages, lowered=False))
    wrong, missing = ("F0.2", "F0.1") if kind is Kind.F else ("[BI]0.0", "B0.1")
    assert re.search(
        rf"stage \d, step \d+, \d{wrong}: waits for .*\d{missing} on stage \d", message
    )


def test_a_backward_before_its_forward_names_the_forward():
    schedule = swap(one_f_one_b(1, 2), 0, "0F0.0", "0B0.0")
    assert "stage 0, step 0, 0B0.0: waits for 0F0.0 on stage 0" in refusal(schedule)


def test_micro_batches_crossed_on_one_stage_wait_in_a_circle():
    schedule = swap(one_f_one_b(2, 2), 0, "0F0.0", "0F1.0")
    schedule = swap(schedule, 0, "0B0.0", "0B1.0")
    message = refusal(swap(schedule, 0, "0F1.0", "0B1.0"))
    assert "stops for ever" in message
    assert "stage 0, step 0, 0B1.0: waits for 0F1.0 on stage 0, 0B1.0 on stage 1" in message
    assert "stage 1, step 0, 0F0.0: waits for 0F0.0 on stage 0" in message


@pytest.mark.parametrize(
    "text, have, check", [("0F1.1", "B", "F"), ("0B1.1", "F", "backward (B, or I and W)")]
)
def test_a_dropped_computation_is_named(text, have, check):
    schedule = one_f_one_b(2, 2, 2)
    dropped = Action.parse(text)
    actions = [action for action in schedule.stages[1] if action != dropped]
    assert refusal(with_stage(schedule, 1, actions)) == (
        "seq1f1b: stage 1 needs exactly one F and one B (or I and W) of 0F1.1; "
        f"it has {have}: check its {check}"
    )


def test_a_computation_that_runs_twice_is_named():
    schedule = one_f_one_b(2, 2)
    actions = [*schedule.stages[0], Action.parse("0B1.0")]
    assert "stage 0, step 3, 0B1.0: runs 2 times" in refusal(with_stage(schedule, 0, actions))


def test_a_part_that_does_not_exist_is_named():
    schedule = one_f_one_b(2, 2)
    actions = [*schedule.stages[0], Action.parse("1F0.0")]
    message = refusal(with_stage(schedule, 0, actions))
    assert "stage 0, step 4, 1F0.0: there is no such part of the model" in message


def test_sends_in_another_order_than_their_receives_are_named():
    schedule = swap(lower(gpipe(2, 2)), 1, "0RECV_F0.0", "0RECV_F1.0")
    assert refusal(schedule) == (
        "gpipe: link from stage 0 to stage 1, transfer 0: the receiver announces 0RECV_F1.0 "
        "where the sender sends 0RECV_F0.0"
    )


@pytest.mark.parametrize(
    "stage, text, message",
    [
        (0, "0SEND_F1.0", "the receiver announces 0RECV_F1.0 where the sender sends nothing"),
        (1, "0RECV_F1.0", "the receiver announces nothing where the sender sends 0RECV_F1.0"),
    ],
)
def test_half_a_transfer_is_named(stage, text, message):
    schedule = lower(one_f_one_b(2, 2))
    actions = [action for action in schedule.stages[stage] if str(action) != text]
    assert f"stage 0 to stage 1, transfer 1: {message}" in refusal(
        with_stage(schedule, stage, actions)
    )


def test_a_transfer_left_out_at_both_ends_is_missed_by_what_needs_it():
    schedule = lower(one_f_one_b(2, 2))
    stages = tuple(
        tuple(a for a in actions if str(a) not in ("0SEND_F1.0", "0RECV_F1.0"))
        for actions in schedule.stages
    )
    message = refusal(schedule.with_stages(stages, lowered=True))
    assert "0F1.0: waits for 0RECV_F1.0 on stage 1, 0SEND_F1.0 on stage 0" in message


def test_a_send_beyond_the_last_stage_is_named():
    schedule = lower(one_f_one_b(2, 2))
    actions = [*schedule.stages[1], Action.parse("0SEND_F0.0")]
    message = refusal(with_stage(schedule, 1, actions))
    assert message.endswith("0SEND_F0.0: stage 1 has nobody at the other end of 0SEND_F0.0")


def test_stages_that_block_in_sends_to_each_other_are_refused():
    """Both announce what they are to receive only after the send that the other waits in."""
    schedule = lower(one_f_one_b(2, 2))
    late = [action for action in schedule.stages[0] if not action.kind.is_receive]
    for receive, use in (("0RECV_B0.0", "0B0.0"), ("0RECV_B1.0", "0B1.0")):
        late.insert(late.index(Action.parse(use)), Action.parse(receive))
    early = list(schedule.stages[1])
    early.remove(Action.parse("0RECV_F1.0"))
    early.insert(early.index(Action.parse("0F1.0")), Action.parse("0RECV_F1.0"))
    message = refusal(with_stage(with_stage(schedule, 0, late), 1, early))
    assert "0SEND_F1.0: waits for 0RECV_F1.0 on stage 1" in message
    assert "0SEND_B0.0: waits for 0RECV_B0.0 on stage 0" in message


def test_more_live_sub_sequences_than_allowed_are_refused():
    schedule = one_f_one_b(4, 8, 2)
    validate(schedule, max_live=5)
    assert refusal(schedule, max_live=4) == (
        "seq1f1b: stage 0, step 4, 0F2.0: the stage holds 5 sub-sequences at once; "
        "at most 4 are allowed"
    )
    validate(schedule, max_live=(5, 4, 3, 2))
    assert "stage 2, step 2, 0F1.0: the stage holds 3" in refusal(schedule, max_live=(5, 4, 2, 2))


@settings(max_examples=60)
@given(schedules(trains=True, largest=6))
def test_every_schedule_names_where_it_exceeds_a_cap(schedule):
    lowered = lower(schedule)
    peaks = peak_live(lowered)
    validate(lowered, max_live=peaks)
    for stage, peak in enumerate(peaks):
        caps = [*peaks[:stage], peak - 1, *peaks[stage + 1 :]]
        message = refusal(lowered, max_live=caps)
        found = re.fullmatch(
            rf"\S+: stage {stage}, step (\d+), (\S+): the stage holds {peak} "
            rf"sub-sequences at once; at most {peak - 1} are allowed",
            message,
        )
        step = int(found[1])
        forward = lowered.stages[stage][step]
        assert (str(forward), forward.kind) == (found[2], Kind.F)
        before = lowered.stages[stage][: step + 1]
        freed = sum(action.kind in (Kind.B, Kind.W) for action in before)
        assert sum(action.kind is Kind.F for action in before) - freed == peak


@settings(max_examples=60)
@given(schedules(trains=True, largest=4), st.data())
def test_receives_in_another_order_than_their_sends_are_refused_in_every_schedule(schedule, data):
    lowered = lower(schedule)
    links = defaultdict(list)
    for stage, actions in enumerate(lowered.stages):
        for action in actions:
            if action.kind.is_receive:
                links[stage, lowered.peer(stage, action)[0], action.kind].append(action)
    crossable = sorted(link for link, actions in links.items() if len(actions) > 1)
    assume(crossable)
    link = data.draw(st.sampled_from(crossable))
    first = data.draw(st.integers(0, len(links[link]) - 2))
    one, other = links[link][first : first + 2]
    message = refusal(swap(lowered, link[0], str(one), str(other)))
    assert f"link from stage {link[1]} to stage {link[0]}, transfer {first}: " in message
    assert f"the receiver announces {other} where the sender sends {one}" in message


def split_backwards(schedule: Schedule, delay: int) -> Schedule:
    """Split each B into I at its place and W ``delay`` actions later."""
    stages = []
    for actions in schedule.stages:
        late: list[Action] = []
        waiting: list[tuple[int, Action]] = []
        for step, action in enumerate(actions):
            if action.kind is Kind.B:
                late.append(action.of_kind(Kind.I))
                waiting.append((step + delay, action.of_kind(Kind.W)))
            else:
                late.append(action)
            while waiting and waiting[0][0] <= step:
                late.append(waiting.pop(0)[1])
        stages.append((*late, *(action for _, action in waiting)))
    return schedule.with_stages(tuple(stages), lowered=False)


@settings(max_examples=40)
@given(schedules(trains=True, largest=6, whole=True), st.integers(0, 9))
def test_split_backwards_are_valid_and_hold_activations_until_their_weight_gradient(
    schedule, delay
):
    split = split_backwards(schedule, delay)
    validate(split)
    validate(lower(split))
    assert all(
        live <= deferred <= live + (delay + 1) // 2 + 1
        for live, deferred in zip(peak_live(schedule), peak_live(split), strict=True)
    )


def test_a_weight_gradient_before_its_input_gradient_is_refused():
    schedule = swap(split_backwards(one_f_one_b(1, 1), 0), 0, "0I0.0", "0W0.0")
    assert "stage 0, step 1, 0W0.0: waits for 0B0.0 on stage 0" in refusal(schedule)


def test_half_a_backward_is_refused():
    schedule = split_backwards(one_f_one_b(1, 1), 0)
    actions = [action for action in schedule.stages[0] if action.kind is not Kind.W]
    assert "it has F, I: check its backward (B, or I and W)" in refusal(
        with_stage(schedule, 0, actions)
    )
