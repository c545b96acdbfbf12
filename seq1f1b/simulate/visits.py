"""When model chunks come to the device and leave it: lanes of copies beside the computations.

A stage has a lane for what it brings in and one for what it takes out. A lane makes its copies one
after the other in the order of the stage's actions, from the moment that the stage reaches the load
or free. A load waits until its slot is given up, which takes until the gradients have left it, and
in later steps until the host has updated its weights. The lanes under one root of the PCIe tree
share its link, one direction apart from the other: they take turns with the whole bandwidth, who
could begin first, or copy at the same time.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from seq1f1b.schedule import Action, Kind, Schedule, residencies
from seq1f1b.simulate.costs import HostLink
from seq1f1b.simulate.links import Clock, Lane, Road, Then, Turns, Uplink


class Copy(NamedTuple):
    """A load or free, by its place in a stage's list of actions, with the time that it takes."""

    stage: int
    place: int
    start: float
    end: float


class Updates(Protocol):
    """What updates weights in host memory between steps."""

    def home(self, step: int, stage: int, chunk: int) -> None:
        """Hear that all gradients of a chunk have arrived."""
        ...

    def wait(self, step: int, stage: int, chunk: int, then: Then) -> None:
        """Call ``then`` once the chunk's weights have been updated behind ``step``."""
        ...


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


class Visits:
    """The copies of a run of ``schedule``, one step after the other, made in order of time.

    ``next`` is to be called when no stage can go on without it: whatever a stage asks for after
    that cannot begin before the copy that ``next`` returns has ended. Places count on from step to
    step.
    """

    def __init__(
        self,
        schedule: Schedule,
        host_link: HostLink,
        updates: Callable[[Clock], Updates] | None = None,
    ) -> None:
        assert schedule.slots is not None
        host_link.check(schedule)
        self._stages, self._slots = schedule.stages, schedule.slots
        self._bytes = copied_bytes(schedule, host_link)
        self._last_free = [
            {action.chunk: action for action in actions if action.kind is Kind.FREE_B}
            for actions in schedule.stages
        ]
        self._clock = Clock()
        self._updates = None if updates is None else updates(self._clock)
        roots = [host_link.root(stage) for stage in range(schedule.num_stages)]
        into, out = ({root: _road(self._clock, host_link) for root in roots} for _ in range(2))
        self._into = [Lane(into[root]) for root in roots]
        self._out = [Lane(out[root]) for root in roots]
        self._leaving: set[tuple[int, int]] = set()  # stage and slot
        self._made: deque[Copy] = deque()

    def issue(self, stage: int, place: int, now: float) -> None:
        """Ask for the load or free at ``place`` of a stage, which reaches it ``now``."""
        self._clock.at(now, partial(self._reach, stage, place))

    def next(self) -> Copy | None:
        """Make the copy that ends first; None if none can be made."""
        while not self._made and self._clock.step():
            pass
        return self._made.popleft() if self._made else None

    def _reach(self, stage: int, place: int) -> None:
        step, number = divmod(place, len(self._stages[stage]))
        action = self._stages[stage][number]
        slot, size = self._slots[stage][action.chunk], self._bytes[stage][action]
        if action.kind is Kind.FREE_B:
            self._leaving.add((stage, slot))
            self._out[stage].copy(size, partial(self._left, stage, place))
        elif action.kind.is_load:
            ask = partial(
                self._into[stage].copy,
                size,
                partial(self._note, stage, place),
                lambda: (stage, slot) not in self._leaving,
            )
            if step and self._updates is not None:
                self._updates.wait(step - 1, stage, action.chunk, ask)
            else:
                ask()

    def _left(self, stage: int, place: int, start: float) -> None:
        """Note that gradients have left, which gives their slot up."""
        step, number = divmod(place, len(self._stages[stage]))
        action = self._stages[stage][number]
        self._note(stage, place, start)
        self._leaving.remove((stage, self._slots[stage][action.chunk]))
        if self._updates is not None and self._last_free[stage][action.chunk] == action:
            self._updates.home(step, stage, action.chunk)
        self._into[stage].go_on()

    def _note(self, stage: int, place: int, start: float) -> None:
        self._made.append(Copy(stage, place, start, self._clock.now))


def _road(clock: Clock, host_link: HostLink) -> Road:
    """Return one direction of a root's link."""
    if host_link.uplink is None:
        return Turns(clock, host_link.bandwidth)
    return Uplink(clock, host_link.uplink, host_link.bandwidth)
