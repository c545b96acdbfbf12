"""Runs a schedule on paper: when every action starts and ends.

A stage runs its actions in their order, each as soon as everything it needs is there. Sends and
receives keep no stage busy: a tensor leaves when it is computed, in a lowered schedule not before
its receive is announced, and follows the tensors that left before it on the same link.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from seq1f1b.schedule import Action, Kind, Schedule, peak_live, validate
from seq1f1b.schedule.edges import dependencies, event
from seq1f1b.simulate.costs import Costs, CostsByMicroBatch, Link, Part

_NOT_YET = -1.0


@dataclass(frozen=True)
class Simulation:
    """Start and end of every action, for each stage in the schedule's order.

    The unit of time is that of the costs. A send lasts from when it is issued, a receive from when
    it is announced, until the tensor is there.
    """

    schedule: Schedule
    starts: tuple[Sequence[float], ...]
    ends: tuple[Sequence[float], ...]

    @cached_property
    def step_time(self) -> float:
        """From the first action's start to the last one's end."""
        return max((max(ends, default=0.0) for ends in self.ends), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """How long each stage computes."""
        return tuple(
            sum(
                end - start
                for action, start, end in zip(actions, starts, ends, strict=True)
                if action.kind.is_compute
            )
            for actions, starts, ends in zip(
                self.schedule.stages, self.starts, self.ends, strict=True
            )
        )

    @property
    def idle(self) -> tuple[float, ...]:
        """How long each stage waits, from the step's start to its end."""
        return tuple(self.step_time - busy for busy in self.busy)

    @property
    def bubble_ratio(self) -> float:
        """Idle time over total time, of all stages together."""
        return sum(self.idle) / (self.step_time * len(self.busy))

    @cached_property
    def peak_live(self) -> tuple[int, ...]:
        """How many sub-sequences (on one model chunk each) every stage holds at most."""
        return peak_live(self.schedule)


def simulate(
    schedule: Schedule, costs: Costs | CostsByMicroBatch, link: Link | None = None
) -> Simulation:
    """Time every action of ``schedule``, lowered or not.

    Raises ScheduleError when the schedule cannot run to its end, CostError when a cost is missing,
    and ValueError for model chunks that visit the device, whose loads have no cost here. Takes
    about 2 seconds for a million computations.
    """
    if schedule.slots is not None:
        raise ValueError(f"{schedule.name} loads model chunks, which has no cost: simulate it bare")
    return _Run(_Table(schedule, costs, link or Link())).finish()


class _Table:
    """The schedule in numbers.

    All micro-batches depend on each other in the same way, so what an action needs is looked up
    once per *template* (stage, kind, chunk, sub-sequence). Template t of micro-batch k is noted at
    place t * num_micro_batches + k of flat lists of times, except that I is noted as its B: who
    waits for a gradient cannot tell which of the two made it.
    """

    def __init__(self, schedule: Schedule, costs: Costs | CostsByMicroBatch, link: Link) -> None:
        self.schedule = schedule
        self.num_micro_batches = schedule.num_micro_batches
        self.places: dict[tuple[int, Action], int] = {}
        self.noted: list[int] = []
        self.durations: list[Sequence[float]] = []
        self.local: list[tuple[int, ...]] = []
        self.remote: list[tuple[int, ...]] = []
        self.channel: list[int] = []
        self.transfer: list[float] = []
        self.latency: list[float] = []
        self.peer: list[int] = []
        self._channels: dict[tuple[int, int, bool], int] = {}
        caches = [_Templates(self, stage) for stage in range(schedule.num_stages)]
        self.programs = [
            [templates[kind, chunk, sub_sequence] for kind, chunk, _, sub_sequence in actions]
            for templates, actions in zip(caches, schedule.stages, strict=True)
        ]
        described = [
            (template, stage, Action(part[0], part[1], 0, part[2]))
            for stage, templates in enumerate(caches)
            for part, template in templates.items()
        ]
        for _, stage, action in sorted(described):
            self._describe(stage, action, costs, link)
        # after all descriptions: an action needed but on no stage's list has a place, never a time
        self.num_places = len(self.places) * self.num_micro_batches
        self.num_channels = len(self._channels)

    def template(self, stage: int, action: Action) -> int:
        """Return the number of a template, given as the action of micro-batch 0."""
        return self.places.setdefault((stage, action), len(self.places))

    def _describe(
        self, stage: int, action: Action, costs: Costs | CostsByMicroBatch, link: Link
    ) -> None:
        schedule = self.schedule
        compute = action.kind.is_compute
        self.noted.append(self.template(*event(stage, action)) * self.num_micro_batches)
        nothing = [0.0] * self.num_micro_batches
        self.durations.append(self._durations_of(stage, action, costs) if compute else nothing)
        local: list[int] = []
        remote: list[int] = []
        if compute:
            for other, need in dependencies(schedule, stage, action):
                place = self.template(other, need) * self.num_micro_batches
                (local if other == stage and not need.kind.is_send else remote).append(place)
        self.local.append(tuple(local))
        self.remote.append(tuple(remote))
        self._connect(stage, action, link)

    def _durations_of(
        self, stage: int, action: Action, costs: Costs | CostsByMicroBatch
    ) -> Sequence[float]:
        """Return how long a computation takes in every micro-batch."""
        if isinstance(costs, Costs):
            return [costs.of(stage, action)] * self.num_micro_batches
        return [
            costs.of(stage, action._replace(micro_batch=k)) for k in range(self.num_micro_batches)
        ]

    def _connect(self, stage: int, action: Action, link: Link) -> None:
        """Note over which channel the result of ``action`` leaves, if it does."""
        schedule, kind = self.schedule, action.kind
        other, peer = None, -1
        if schedule.lowered and not kind.is_compute:
            end = schedule.peer(stage, action)
            peer = self.template(*end) * self.num_micro_batches
            other = end[0] if kind.is_send else None
        elif not schedule.lowered and kind is not Kind.W:
            next_part = schedule.downstream if kind is Kind.F else schedule.upstream
            target = next_part(stage, action.chunk)
            other = target[0] if target else None
        far = other is not None and other != stage
        self.peer.append(peer)
        self.latency.append(link.latency if far else 0.0)
        self.transfer.append(link.transfer(action.sub_sequence) if far else 0.0)
        if other is None:
            self.channel.append(-1)
        else:
            key = (stage, other, kind in (Kind.F, Kind.SEND_F))
            self.channel.append(self._channels.setdefault(key, len(self._channels)))


class _Templates(dict[Part, int]):
    """The templates of one stage's actions, numbered when first asked for."""

    def __init__(self, table: _Table, stage: int) -> None:
        self.table = table
        self.stage = stage

    def __missing__(self, part: Part) -> int:
        kind, chunk, sub_sequence = part
        template = self.table.template(self.stage, Action(kind, chunk, 0, sub_sequence))
        self[part] = template
        return template


class _Run:
    """Goes through all stages' programs, from one wait to the next."""

    def __init__(self, table: _Table) -> None:
        self.table = table
        self.done = [_NOT_YET] * table.num_places
        self.arrived = [_NOT_YET] * table.num_places
        self.channel_free = [0.0] * table.num_channels
        self.steps = [0] * len(table.programs)
        self.free = [0.0] * len(table.programs)
        self.waiting: dict[int, int] = {}
        self.starts: list[list[float]] = [[] for _ in table.programs]
        self.ends: list[list[float]] = [[] for _ in table.programs]

    def finish(self) -> Simulation:
        schedule = self.table.schedule
        ready = list(range(len(self.steps)))
        while ready:
            ready += self.advance(ready.pop())
        for stage, actions in enumerate(schedule.stages):
            if self.steps[stage] < len(actions):
                validate(schedule)
        if schedule.lowered:
            self.set_ends_of_transfers()
        return Simulation(schedule, tuple(self.starts), tuple(self.ends))

    def advance(self, stage: int) -> list[int]:
        """Run ``stage`` until it has to wait; return the stages that can go on because of that."""
        table, done, arrived, waiting = self.table, self.done, self.arrived, self.waiting
        starts, ends = self.starts[stage], self.ends[stage]
        actions, program = table.schedule.stages[stage], table.programs[stage]
        durations, local, remote = table.durations, table.local, table.remote
        noted = table.noted
        woken: list[int] = []
        now = self.free[stage]
        step = self.steps[stage]
        while step < len(program):
            template = program[step]
            micro_batch = actions[step].micro_batch
            start = now
            for base in remote[template]:
                there = arrived[base + micro_batch]
                if there < 0.0:
                    waiting[base + micro_batch] = stage
                    break
                start = max(start, there)
            else:
                if any(done[base + micro_batch] < 0.0 for base in local[template]):
                    break
                now = start + durations[template][micro_batch]
                done[noted[template] + micro_batch] = now
                starts.append(start)
                ends.append(now)
                step += 1
                self.dispatch(template, micro_batch, now, woken)
                continue
            break
        self.free[stage] = now
        self.steps[stage] = step
        return woken

    def dispatch(self, template: int, micro_batch: int, now: float, woken: list[int]) -> None:
        """Send what has just been made, or what a receive just announced was waiting for."""
        table = self.table
        peer = table.peer[template]
        place = table.noted[template] + micro_batch
        if peer >= 0:
            other = self.done[peer + micro_batch]
            if other < 0.0:
                return
            now = max(now, other)
            if table.channel[template] < 0:
                template, place = peer // table.num_micro_batches, peer + micro_batch
        channel = table.channel[template]
        if channel < 0:
            return
        gone = max(now, self.channel_free[channel]) + table.transfer[template]
        self.channel_free[channel] = gone
        self.arrived[place] = gone + table.latency[template]
        stage = self.waiting.pop(place, None)
        if stage is not None:
            woken.append(stage)

    def set_ends_of_transfers(self) -> None:
        table = self.table
        for stage, actions in enumerate(table.schedule.stages):
            for step, action in enumerate(actions):
                if action.kind.is_compute:
                    continue
                template = table.programs[stage][step]
                is_send = action.kind.is_send
                base = template * table.num_micro_batches if is_send else table.peer[template]
                self.ends[stage][step] = self.arrived[base + action.micro_batch]
