"""When model chunks come to the device and leave it: lanes of copies beside the computations.

A stage has a lane for what it brings in and one for what it takes out. A lane makes its copies one
after the other in the order of the stage's actions, from the moment that the stage reaches the load
or free. A load waits until its slot is given up, which takes until the gradients have left it. The
lanes under one root of the PCIe tree take turns on its link, one direction apart from the other:
who could begin first goes first, with the whole bandwidth.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from seq1f1b.schedule import Action, Kind, Schedule, residencies
from seq1f1b.simulate.costs import HostLink


class Copy(NamedTuple):
    """A load or free, by its place in a stage's list of actions, with the time that it takes."""

    stage: int
    step: int
    start: float
    end: float


def copied_bytes(schedule: Schedule, host_link: HostLink) -> list[dict[Action, float]]:
    """Return for each stage what every load brings and every free takes out.

    A load brings weights, and gradients if it leads to a backward after some have already left. A
    free after backwards takes gradients out, a free after forwards nothing.
    """
    assert schedule.slots is not None, f"{schedule.name} has no slots"
    stages: list[dict[Action, float]] = []
    for stage, (actions, slots) in enumerate(zip(schedule.stages, schedule.slots, strict=True)):
        sizes: dict[Action, float] = {}
        begun: set[int] = set()
        for visit in residencies(actions, slots):
            gradients = host_link.gradients[stage][visit.chunk] if visit.goes_backward else 0.0
            back = gradients if visit.chunk in begun else 0.0
            sizes[visit.load] = host_link.weights[stage][visit.chunk] + back
            sizes[visit.free] = gradients
            if visit.goes_backward:
                begun.add(visit.chunk)
        stages.append(sizes)
    return stages


@dataclass
class _Lane:
    """Copies of a stage in one direction that have been asked for: step, moment and slot of each.

    free: when the last one ended.
    """

    stage: int
    link: tuple[int, bool]
    waiting: deque[tuple[int, float, int]] = field(default_factory=deque)
    free: float = 0.0


class Visits:
    """The copies of one run of ``schedule``, made in order of time.

    ``next`` is to be called when no stage can go on without it: whatever a stage asks for after
    that cannot begin before what is waiting already.
    """

    def __init__(self, schedule: Schedule, host_link: HostLink) -> None:
        assert schedule.slots is not None
        assert schedule.num_slots is not None
        host_link.check(schedule)
        self._schedule, self._slots = schedule, schedule.slots
        self._bytes = copied_bytes(schedule, host_link)
        self._bandwidth = host_link.bandwidth
        self._lanes = [
            (_Lane(stage, (root, False)), _Lane(stage, (root, True)))
            for stage, root in enumerate(map(host_link.root, range(schedule.num_stages)))
        ]
        self._link_free: dict[tuple[int, bool], float] = {}
        # when each slot can be filled; None while gradients are on their way out
        self._slot_free: list[list[float | None]] = [
            [0.0] * schedule.num_slots for _ in range(schedule.num_stages)
        ]

    def loads(self) -> Iterator[tuple[int, int]]:
        """Yield stage and step of every load."""
        for stage, actions in enumerate(self._schedule.stages):
            for step, action in enumerate(actions):
                if action.kind.is_load:
                    yield stage, step

    def issue(self, stage: int, step: int, now: float) -> None:
        """Ask for the load or free at ``step`` of a stage, which reaches it ``now``."""
        action = self._schedule.stages[stage][step]
        slot = self._slots[stage][action.chunk]
        if action.kind is Kind.FREE_F:
            self._slot_free[stage][slot] = now
            return
        if action.kind is Kind.FREE_B:
            self._slot_free[stage][slot] = None
        self._lanes[stage][action.kind.is_free].waiting.append((step, now, slot))

    def next(self) -> Copy | None:
        """Make the copy that can begin first; None if none is waiting."""
        first: tuple[float, _Lane] | None = None
        for lanes in self._lanes:
            for lane in lanes:
                ready = self._ready(lane)
                if ready is not None and (first is None or ready < first[0]):
                    first = ready, lane
        if first is None:
            return None
        ready, lane = first
        step, _, slot = lane.waiting.popleft()
        action = self._schedule.stages[lane.stage][step]
        start = max(ready, self._link_free.get(lane.link, 0.0))
        end = start + self._bytes[lane.stage][action] / self._bandwidth
        lane.free = self._link_free[lane.link] = end
        if action.kind.is_free:
            self._slot_free[lane.stage][slot] = end
        return Copy(lane.stage, step, start, end)

    def _ready(self, lane: _Lane) -> float | None:
        """Return when a lane's next copy could begin on a link of its own."""
        if not lane.waiting:
            return None
        _, asked, slot = lane.waiting[0]
        if lane is self._lanes[lane.stage][True]:
            return max(asked, lane.free)
        given_up = self._slot_free[lane.stage][slot]
        return None if given_up is None else max(asked, lane.free, given_up)
