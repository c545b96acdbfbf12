"""Times a few steps of a schedule whose model chunks visit the device, Adam on the host included.

Copies are those of ``seq1f1b.simulate.visits``: lanes of one direction share the uplink of their
root evenly. A load begins no earlier than the host has updated the chunk's weights. Tensors between
stages travel at a rate of their own and delay no load.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from seq1f1b.offload.planning.machine import Machine
from seq1f1b.schedule import Schedule
from seq1f1b.simulate import Costs, HostLink, Link, copied_bytes, simulate
from seq1f1b.simulate.links import Clock, Queue, Then

_SETTLED = 1
"""Steps before those that are timed: the first finds all weights updated."""


class Adam(StrEnum):
    """When the host updates a chunk's weights."""

    SERIAL = "serial"
    JUST_IN_TIME = "just-in-time"
    ON_ARRIVAL = "on-arrival"

    @property
    def clips(self) -> bool:
        """Whether the norm of all gradients is known before the first update."""
        return self is not Adam.ON_ARRIVAL


@dataclass(frozen=True)
class Bytes:
    """What moves, by stage and chunk: bytes of weights and gradients, seconds of Adam on the host.

    weights, gradients: bytes. adam: seconds.
    """

    weights: tuple[tuple[float, ...], ...]
    gradients: tuple[tuple[float, ...], ...]
    adam: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Visits:
    """Steps of a schedule whose chunks visit the device.

    seconds: of a step, once the first is over. loads: of each stage and step. uplink_bytes: of a
    step, of the busiest direction of a root. busy: seconds that each stage computes in a step.
    """

    seconds: float
    loads: tuple[int, ...]
    uplink_bytes: float
    busy: tuple[float, ...]


def simulate_visits(
    schedule: Schedule,
    costs: Costs,
    link: Link,
    moves: Bytes,
    machine: Machine,
    adam: Adam,
    *,
    num_steps: int = 4,
) -> Visits:
    """Time ``num_steps`` steps of ``schedule``, whose slots ``visiting`` has dealt.

    A step's seconds are the mean distance between the ends of steps. Raises ValueError for a
    schedule without slots and for less than 2 steps behind the first.
    """
    if schedule.slots is None:
        raise ValueError(f"{schedule.name} has no slots: deal them with visiting()")
    if num_steps < 2 + _SETTLED:
        raise ValueError(f"{num_steps} steps: at least {2 + _SETTLED} are needed to time one")
    bare = _without_transport(schedule)
    roots = tuple(machine.root(stage) for stage in range(schedule.num_stages))
    host_link = HostLink(moves.weights, moves.gradients, machine.pcie, roots, machine.uplink)
    updates = partial(_Updates, adam, moves.adam)
    result = simulate(bare, costs, link, host_link, num_steps=num_steps, updates=updates)
    ends = _ends_of_steps(bare, result.ends, num_steps)
    return Visits(
        seconds=(ends[-1] - ends[_SETTLED]) / (num_steps - 1 - _SETTLED),
        loads=tuple(sum(a.kind.is_load for a in actions) for actions in bare.stages),
        uplink_bytes=_uplink_bytes(bare, host_link),
        busy=tuple(busy / num_steps for busy in result.busy),
    )


def _without_transport(schedule: Schedule) -> Schedule:
    """Return the schedule without sends and receives, which computations imply."""
    stages = tuple(
        tuple(
            action
            for action in actions
            if action.kind.is_compute or action.kind.is_load or action.kind.is_free
        )
        for actions in schedule.stages
    )
    return schedule.with_stages(stages, lowered=False)


def _ends_of_steps(step: Schedule, ends: Sequence[Sequence[float]], num_steps: int) -> list[float]:
    """Return when the last computation of every step ends."""
    last = [0.0] * num_steps
    for actions, moments in zip(step.stages, ends, strict=True):
        place = max(place for place, action in enumerate(actions) if action.kind.is_compute)
        for number, end in enumerate(moments[place :: len(actions)]):
            last[number] = max(last[number], end)
    return last


def _uplink_bytes(schedule: Schedule, host_link: HostLink) -> float:
    """Return the bytes of a step in the busiest direction of a root."""
    totals: defaultdict[tuple[int, bool], float] = defaultdict(float)
    for stage, sizes in enumerate(copied_bytes(schedule, host_link)):
        for action, size in sizes.items():
            totals[host_link.root(stage), action.kind.is_load] += size
    return max(totals.values())


class _Updates:
    """Adam on the host: one chunk's weights after the other, and when loads may have them.

    seconds: of every stage's chunks.
    """

    def __init__(self, adam: Adam, seconds: Sequence[Sequence[float]], clock: Clock) -> None:
        self._adam, self._seconds = adam, seconds
        self._host = Queue(clock)
        stages, chunks = range(len(seconds)), range(len(seconds[0]))
        self._parts = [(stage, chunk) for chunk in chunks for stage in stages]
        self._home: defaultdict[int, int] = defaultdict(int)
        self._updated: defaultdict[int, int] = defaultdict(int)
        self._released: set[tuple[int, int, int]] = set()
        self._waiting: defaultdict[tuple[int, int, int], list[Then]] = defaultdict(list)

    def home(self, step: int, stage: int, chunk: int) -> None:
        """Update what can be, now that a chunk's gradients are complete on the host."""
        self._home[step] += 1
        if not self._adam.clips:
            self._update(step, stage, chunk)
        elif self._home[step] == len(self._parts):
            for part in self._parts:
                self._update(step, *part)

    def wait(self, step: int, stage: int, chunk: int, then: Then) -> None:
        """Call ``then`` once loads may have the weights that ``step`` leads to."""
        if (step, stage, chunk) in self._released:
            then()
        else:
            self._waiting[step, stage, chunk].append(then)

    def _update(self, step: int, stage: int, chunk: int) -> None:
        self._host.work(self._seconds[stage][chunk], partial(self._done, step, stage, chunk))

    def _done(self, step: int, stage: int, chunk: int) -> None:
        self._updated[step] += 1
        if self._adam is not Adam.SERIAL:
            self._release(step, stage, chunk)
        elif self._updated[step] == len(self._parts):
            for part in self._parts:
                self._release(step, *part)

    def _release(self, step: int, stage: int, chunk: int) -> None:
        key = step, stage, chunk
        self._released.add(key)
        for then in self._waiting.pop(key, []):
            then()
