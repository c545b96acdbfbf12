"""What must have happened before an action may run."""

from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.schedule import Schedule

Event = tuple[int, Action]


def event(stage: int, action: Action) -> Event:
    """Return what running ``action`` on ``stage`` makes true.

    An input-gradient half I counts as its backward B: whoever waits for a gradient cannot tell the
    two apart.
    """
    return stage, action.of_kind(Kind.B) if action.kind is Kind.I else action


def dependencies(schedule: Schedule, stage: int, action: Action) -> list[Event]:
    """Return the events that ``action`` on ``stage`` waits for.

    - F of sub-sequence j needs F of the model part before it, and F of j - 1 on the same part,
      whose keys and values it attends to.
    - B (or I) needs F, B of the model part behind it, and B of j + 1 on the same part, which adds
      to the gradients of its keys and values.
    - W needs I.
    - A send needs the computation that makes its tensor and, taken at its worst as a send that
      blocks, the receive announced at the other end. What uses a received tensor needs both the
      receive and the send.
    """
    chunk, sub_sequence = action.chunk, action.sub_sequence
    needed: list[Event] = []
    if action.kind is Kind.F:
        if source := schedule.upstream(stage, chunk):
            needed += _arrival(schedule, stage, action, Kind.RECV_F, source)
        if sub_sequence > 0:
            needed.append((stage, action._replace(sub_sequence=sub_sequence - 1)))
    elif action.kind in (Kind.B, Kind.I):
        backward = action.of_kind(Kind.B)
        needed.append((stage, action.of_kind(Kind.F)))
        if source := schedule.downstream(stage, chunk):
            needed += _arrival(schedule, stage, backward, Kind.RECV_B, source)
        if sub_sequence < schedule.num_splits - 1:
            needed.append((stage, backward._replace(sub_sequence=sub_sequence + 1)))
    elif action.kind is Kind.W:
        needed.append((stage, action.of_kind(Kind.B)))
    elif action.kind.is_send:
        made_by = Kind.F if action.kind is Kind.SEND_F else Kind.B
        needed += [(stage, action.of_kind(made_by)), schedule.peer(stage, action)]
    return needed


def _arrival(
    schedule: Schedule, stage: int, action: Action, receive: Kind, source: tuple[int, int]
) -> list[Event]:
    """Return what brings ``action`` its tensor: communication, or before lowering computation."""
    if schedule.lowered:
        received = action.of_kind(receive)
        return [(stage, received), schedule.peer(stage, received)]
    return [(source[0], action._replace(chunk=source[1]))]
