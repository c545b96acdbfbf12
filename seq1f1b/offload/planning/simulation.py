"""Runs a schedule whose model chunks visit the device on paper, for a few steps.

Each GPU computes, loads and unloads at the same time: three lanes. The lanes of one direction share
the uplink of their root. A load is asked for where the schedule has it, and begins once the host
has updated the chunk's weights. A backward waits until the gradients of its slot's former chunk
have left. Tensors between stages travel at a rate of their own and delay no load.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial

from seq1f1b.offload.planning.links import Clock, Lane, Queue, Then, Uplink
from seq1f1b.offload.planning.machine import Machine
from seq1f1b.schedule import Action, Kind, Schedule, residencies
from seq1f1b.simulate import Costs, Link

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

    weights: Sequence[Sequence[float]]
    gradients: Sequence[Sequence[float]]
    adam: Sequence[Sequence[float]]


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
    return _Run(schedule, costs, link, moves, machine, adam, num_steps).finish()


class _Stage:
    """One stage's place in its list, and what is on its device."""

    def __init__(self, actions: Sequence[Action], slots: Sequence[int]) -> None:
        self.actions = [action for action in actions if _keeps(action)]
        self.slots = slots
        visits = residencies(self.actions, slots)
        self.goes_backward = {visit.load: visit.goes_backward for visit in visits}
        self.last = {a.chunk: a for a in self.actions if a.kind is Kind.B}
        self.step = self.place = 0
        self.is_computing = False
        self.num_backwards: defaultdict[int, int] = defaultdict(int)
        self.there: set[int] = set()
        self.leaving: defaultdict[int, int] = defaultdict(int)
        self.busy = 0.0
        self.loads = 0


def _keeps(action: Action) -> bool:
    return action.kind.is_compute or action.kind.is_load or action.kind.is_free


class _Run:
    """The event simulation."""

    def __init__(
        self,
        schedule: Schedule,
        costs: Costs,
        link: Link,
        moves: Bytes,
        machine: Machine,
        adam: Adam,
        num_steps: int,
    ) -> None:
        self.schedule, self.costs, self.link, self.moves = schedule, costs, link, moves
        self.adam, self.num_steps = adam, num_steps
        assert schedule.slots is not None
        self.stages = [
            _Stage(actions, slots)
            for actions, slots in zip(schedule.stages, schedule.slots, strict=True)
        ]
        self.clock = Clock()
        self.host = Queue(self.clock)
        ways = range(2)
        self.uplinks = [
            [Uplink(self.clock, machine.uplink, machine.pcie) for _ in ways]
            for _ in range(machine.num_roots)
        ]
        roots = [self.uplinks[machine.root(stage)] for stage in range(schedule.num_stages)]
        self.loading = [Lane(ways[0]) for ways in roots]
        self.unloading = [Lane(ways[1]) for ways in roots]
        self.arrived: set[tuple[int, int, Action]] = set()
        self.released: set[tuple[int, int, int]] = set()
        self.when_released: defaultdict[tuple[int, int, int], list[Then]] = defaultdict(list)
        self.when_left: defaultdict[tuple[int, int], list[Then]] = defaultdict(list)
        self.home: defaultdict[int, int] = defaultdict(int)
        self.updated: defaultdict[int, int] = defaultdict(int)
        self.ends = [0.0] * num_steps

    @cached_property
    def num_parts(self) -> int:
        return self.schedule.num_stages * self.schedule.num_chunks

    def finish(self) -> Visits:
        for stage in range(len(self.stages)):
            self.clock.at(0.0, partial(self.advance, stage))
        self.clock.run()
        assert all(stage.step == self.num_steps for stage in self.stages), "stages are stuck"
        timed = self.num_steps - 1 - _SETTLED
        return Visits(
            seconds=(self.ends[-1] - self.ends[_SETTLED]) / timed,
            loads=tuple(stage.loads // self.num_steps for stage in self.stages),
            uplink_bytes=max(way.num_bytes for ways in self.uplinks for way in ways)
            / self.num_steps,
            busy=tuple(stage.busy / self.num_steps for stage in self.stages),
        )

    def advance(self, number: int) -> None:
        """Let a stage go on until it has to wait."""
        stage = self.stages[number]
        while not stage.is_computing and stage.step < self.num_steps:
            action = stage.actions[stage.place]
            if action.kind.is_load:
                self.load(number, action)
            elif action.kind.is_free:
                self.free(number, action)
            elif self.is_ready(number, action):
                self.compute(number, action)
                return
            else:
                return
            self.pass_by(stage)

    def pass_by(self, stage: _Stage) -> None:
        stage.place += 1
        if stage.place == len(stage.actions):
            stage.place, stage.step = 0, stage.step + 1
            stage.num_backwards.clear()

    def is_ready(self, number: int, action: Action) -> bool:
        stage, schedule = self.stages[number], self.schedule
        if action.chunk not in stage.there:
            return False
        forward = action.kind is Kind.F
        if not forward and stage.leaving[stage.slots[action.chunk]]:
            return False
        before = (schedule.upstream if forward else schedule.downstream)(number, action.chunk)
        return before is None or (stage.step, number, action) in self.arrived

    def compute(self, number: int, action: Action) -> None:
        stage = self.stages[number]
        seconds = self.costs.of(number, action)
        stage.is_computing = True
        stage.busy += seconds
        self.clock.at(self.clock.now + seconds, partial(self.computed, number, action))

    def computed(self, number: int, action: Action) -> None:
        stage, schedule = self.stages[number], self.schedule
        stage.is_computing = False
        forward = action.kind is Kind.F
        if not forward:
            stage.num_backwards[action.chunk] += 1
        self.ends[stage.step] = max(self.ends[stage.step], self.clock.now)
        after = (schedule.downstream if forward else schedule.upstream)(number, action.chunk)
        if after is not None:
            travels = 0.0
            if after[0] != number:
                travels = self.link.latency + self.link.transfer(action.sub_sequence)
            there = action._replace(chunk=after[1])
            self.clock.at(
                self.clock.now + travels, partial(self.arrive, stage.step, after[0], there)
            )
        self.pass_by(stage)
        self.advance(number)

    def arrive(self, step: int, number: int, action: Action) -> None:
        self.arrived.add((step, number, action))
        self.advance(number)

    def load(self, number: int, action: Action) -> None:
        """Ask for the chunk's weights and, if some of its backwards have run, its gradients."""
        stage, chunk = self.stages[number], action.chunk
        stage.loads += 1
        size = self.moves.weights[number][chunk]
        back_again = stage.goes_backward[action] and stage.num_backwards[chunk] > 0
        if back_again:
            size += self.moves.gradients[number][chunk]
        start = partial(self.loading[number].copy, size, partial(self.loaded, number, chunk))
        released = stage.step - 1, number, chunk
        left = number, stage.slots[chunk]
        if stage.step > 0 and released not in self.released:
            self.when_released[released].append(start)
        elif back_again and stage.leaving[stage.slots[chunk]]:
            self.when_left[left].append(start)
        else:
            start()

    def loaded(self, number: int, chunk: int) -> None:
        self.stages[number].there.add(chunk)
        self.advance(number)

    def free(self, number: int, action: Action) -> None:
        """Give the slot up; gradients leave first."""
        stage, chunk = self.stages[number], action.chunk
        stage.there.remove(chunk)
        if action.kind is not Kind.FREE_B:
            return
        slot = stage.slots[chunk]
        stage.leaving[slot] += 1
        is_complete = action[1:] == stage.last[chunk][1:]
        self.unloading[number].copy(
            self.moves.gradients[number][chunk],
            partial(self.left, stage.step, number, chunk, slot, is_complete),
        )

    def left(self, step: int, number: int, chunk: int, slot: int, is_complete: bool) -> None:
        leaving = self.stages[number].leaving
        leaving[slot] -= 1
        if is_complete:
            self.come_home(step, number, chunk)
        if not leaving[slot]:
            for start in self.when_left.pop((number, slot), []):
                start()
        self.advance(number)

    def come_home(self, step: int, number: int, chunk: int) -> None:
        """Hand Adam what it can do now that a chunk's gradients are complete on the host."""
        self.home[step] += 1
        if not self.adam.clips:
            self.update(step, number, chunk)
        elif self.home[step] == self.num_parts:
            for each in range(self.schedule.num_chunks):
                for stage in range(len(self.stages)):
                    self.update(step, stage, each)

    def update(self, step: int, number: int, chunk: int) -> None:
        seconds = self.moves.adam[number][chunk]
        self.host.work(seconds, partial(self.update_done, step, number, chunk))

    def update_done(self, step: int, number: int, chunk: int) -> None:
        self.updated[step] += 1
        if self.adam is not Adam.SERIAL:
            self.release(step, number, chunk)
        elif self.updated[step] == self.num_parts:
            for stage in range(len(self.stages)):
                for each in range(self.schedule.num_chunks):
                    self.release(step, stage, each)

    def release(self, step: int, number: int, chunk: int) -> None:
        """Let the next step load a chunk's new weights."""
        key = step, number, chunk
        self.released.add(key)
        for start in self.when_released.pop(key, []):
            start()
