"""Add sends and receives to a schedule of computations."""

from collections.abc import Iterator, Sequence

from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.plan import Schedule


def lower(schedule: Schedule) -> Schedule:
    """Return ``schedule`` with its communication written out.

    A tensor is sent as soon as it is computed. A receive is announced one computation before the
    one that uses it, so the tensor travels while the stage computes, and a stage that blocks in a
    send has always announced what its neighbour may want to send first.
    """
    if schedule.lowered:
        return schedule
    stages = tuple(
        tuple(_with_communication(schedule, stage, actions))
        for stage, actions in enumerate(schedule.stages)
    )
    return schedule.with_stages(stages, lowered=True)


def _with_communication(
    schedule: Schedule, stage: int, actions: Sequence[Action]
) -> Iterator[Action]:
    receives = [_receive(schedule, stage, action) for action in actions]
    for step, action in enumerate(actions):
        upcoming = receives[0:2] if step == 0 else receives[step + 1 : step + 2]
        yield from (receive for receive in upcoming if receive)
        yield action
        if send := _send(schedule, stage, action):
            yield send


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
