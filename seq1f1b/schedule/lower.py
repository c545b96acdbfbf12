"""Add sends and receives to a schedule of computations."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol

from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.edges import Event, dependencies, event
from seq1f1b.schedule.schedule import Schedule
from seq1f1b.schedule.validate import validate


class ActionCosts(Protocol):
    """How long every computation takes, as ``seq1f1b.simulate.Costs`` has it."""

    def of(self, stage: int, action: Action) -> float:
        """Return how long ``action`` takes on ``stage``."""
        ...


class _Textbook:
    """All forwards alike, and backwards twice as long."""

    def of(self, stage: int, action: Action) -> float:
        """See ActionCosts."""
        return 2.0 if action.kind is Kind.B else 1.0


def lower(schedule: Schedule, costs: ActionCosts | None = None) -> Schedule:
    """Return ``schedule`` with its communication written out.

    A tensor is sent as soon as it is computed. A receive is announced one computation before the
    one that uses it, so the tensor travels while the stage computes; or earlier, if the tensor
    would be there earlier when every forward takes the same time and every backward twice that.
    Announcements come before the send of the same moment. So by the time, in that reckoning, that a
    stage sends, its neighbour has announced, and sends that block cannot wait in a circle.

    Raises ScheduleError when the computations wait for each other in a circle.
    """
    if schedule.lowered:
        return schedule
    finish = _finish_times(schedule, costs or _Textbook())
    stages = tuple(
        tuple(_with_communication(schedule, stage, finish)) for stage in range(schedule.num_stages)
    )
    return schedule.with_stages(stages, lowered=True)


def _with_communication(
    schedule: Schedule, stage: int, finish: dict[Event, float]
) -> Iterator[Action]:
    actions = schedule.stages[stage]
    receives = _receives(schedule, stage, finish)
    yield from receives[0]
    for step, action in enumerate(actions):
        yield action
        yield from receives[step + 1]
        if send := _send(schedule, stage, action):
            yield send


def _receives(
    schedule: Schedule, stage: int, finish: dict[Event, float]
) -> Sequence[Sequence[Action]]:
    """Return the receives to announce before each computation, in the order of their arrival."""
    actions = schedule.stages[stage]
    free_from = [0, *(finish[event(stage, action)] for action in actions)]
    links: dict[tuple[int, Kind], list[tuple[float, int, Action]]] = defaultdict(list)
    for step, action in enumerate(actions):
        receive = _receive(schedule, stage, action)
        if receive is None:
            continue
        source, sent = schedule.peer(stage, receive)
        arrival = finish[source, sent.of_kind(Kind.F if action.kind is Kind.F else Kind.B)]
        slot = min(max(step - 1, 0), bisect_right(free_from, arrival) - 1)
        links[source, sent.kind].append((arrival, slot, receive))
    announced: list[list[tuple[float, Action]]] = [[] for _ in free_from]
    for transfers in links.values():
        # what is used before an earlier arrival of its link must not be announced before it
        latest = len(actions)
        for arrival, slot, receive in sorted(transfers, reverse=True):
            latest = min(latest, slot)
            announced[latest].append((arrival, receive))
    in_order = (sorted(slot, key=lambda entry: entry[0]) for slot in announced)
    return [[receive for _, receive in slot] for slot in in_order]


def _receive(schedule: Schedule, stage: int, action: Action) -> Action | None:
    if action.kind is Kind.F and schedule.upstream(stage, action.chunk):
        return action.of_kind(Kind.RECV_F)
    if action.kind in (Kind.B, Kind.I) and schedule.downstream(stage, action.chunk):
        return action.of_kind(Kind.RECV_B)
    return None


def _send(schedule: Schedule, stage: int, action: Action) -> Action | None:
    if action.kind is Kind.F and schedule.downstream(stage, action.chunk):
        return action.of_kind(Kind.SEND_F)
    if action.kind in (Kind.B, Kind.I) and schedule.upstream(stage, action.chunk):
        return action.of_kind(Kind.SEND_B)
    return None


def _finish_times(schedule: Schedule, costs: ActionCosts) -> dict[Event, float]:
    """Return when each computation ends if transfers take no time."""
    finish: dict[Event, float] = {}
    free_from = [0.0] * schedule.num_stages
    steps = [0] * schedule.num_stages
    progress = True
    while progress:
        progress = False
        for stage, actions in enumerate(schedule.stages):
            while steps[stage] < len(actions):
                action = actions[steps[stage]]
                needed = dependencies(schedule, stage, action)
                if not all(need in finish for need in needed):
                    break
                start = max([free_from[stage], *(finish[need] for need in needed)])
                free_from[stage] = start + costs.of(stage, action)
                finish[event(stage, action)] = free_from[stage]
                steps[stage] += 1
                progress = True
    if any(step < len(actions) for step, actions in zip(steps, schedule.stages, strict=True)):
        validate(schedule)
    return finish
