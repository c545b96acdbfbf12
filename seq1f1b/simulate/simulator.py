"""Runs a schedule on paper: when every action starts and ends.

A stage runs its actions in their order, each as soon as everything it needs is there. Sends and
receives keep no stage busy: a tensor leaves when it is computed, in a lowered schedule not before
its receive is announced, and follows the tensors that left before it on the same link. Model chunks
that visit the device are copied beside the computations (see ``visits``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from seq1f1b.schedule import Action, Kind, Schedule, peak_live, validate
from seq1f1b.schedule.edges import dependencies, event
from seq1f1b.simulate.costs import Costs, CostsByMicroBatch, HostLink, Link, Part
from seq1f1b.simulate.links import Clock
from seq1f1b.simulate.visits import Updates, Visits

_NOT_YET = -1.0


@dataclass(frozen=True)
class Simulation:
    """Start and end of every action, for each stage in the schedule's order.

    The unit of time is that of the costs. A send lasts from when it is issued, a receive from when
    it is announced, until the tensor is there. A load, or a free that takes gradients out, lasts
    while it is copied; it does not begin before the link is its own.
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
    def copying(self) -> tuple[tuple[float, float], ...]:
        """How long model chunks are copied to each stage's device, and gradients from it."""
        totals = []
        for actions, starts, ends in zip(self.schedule.stages, self.starts, self.ends, strict=True):
            into = out = 0.0
            for action, start, end in zip(actions, starts, ends, strict=True):
                if action.kind.is_load:
                    into += end - start
                elif action.kind.is_free:
                    out += end - start
            totals.append((into, out))
        return tuple(totals)

    @cached_property
    def peak_live(self) -> tuple[int, ...]:
        """How many sub-sequences (on one model chunk each) every stage holds at most."""
        return peak_live(self.schedule)


def simulate(
    schedule: Schedule,
    costs: Costs | CostsByMicroBatch,
    link: Link | None = None,
    host_link: HostLink | None = None,
    *,
    num_steps: int = 1,
    updates: Callable[[Clock], Updates] | None = None,
) -> Simulation:
    """Time every action of ``schedule``, lowered or not.

    ``host_link`` brings model chunks that visit the device. num_steps: of the schedule, one after
    the other: the simulation's schedule has all of their micro-batches, and a stage begins a step
    as soon as it can. updates: of weights in host memory, for which the next step's loads wait.

    Raises ScheduleError when the schedule cannot run to its end, CostError when a cost is missing,
    and ValueError for a schedule that loads model chunks without a ``host_link``, or the other way
    round. Takes about 2 seconds for a million computations.
    """
    if schedule.slots is not None and host_link is None:
        raise ValueError(f"{schedule.name} loads model chunks: it needs a host_link, to time them")
    if schedule.slots is None and host_link is not None:
        raise ValueError(f"{schedule.name} loads no model chunks: leave out the host_link")
    visits = None if host_link is None else Visits(schedule, host_link, updates)
    table = _Table(_repeated(schedule, num_steps), costs, link or Link())
    return _Run(table, visits).finish()


def _repeated(schedule: Schedule, num_steps: int) -> Schedule:
    """Return a schedule of ``num_steps`` times as many micro-batches, a step after the other."""
    if num_steps == 1:
        return schedule
    each = schedule.num_micro_batches
    stages = tuple(
        tuple(
            Action(kind, chunk, step * each + micro_batch, sub_sequence)
            for step in range(num_steps)
            for kind, chunk, micro_batch, sub_sequence in actions
        )
        for actions in schedule.stages
    )
    return replace(schedule, num_micro_batches=num_steps * each, stages=stages)


@dataclass(slots=True)
class _Template:
    """What all actions of a stage of one kind, model chunk and sub-sequence have in common.

    Moments of micro-batch k are noted at place ``noted`` + k of flat lists. durations: of each
    micro-batch. local, remote: places of what is needed, on this stage and from elsewhere. channel:
    over which a tensor leaves, for ``transfer`` and ``latency``; -1 for none. peer: where the other
    end of a send or receive is noted, -1 for none; sender: the send of the two. visits: whether it
    is a load or a free.
    """

    noted: int = -1
    durations: Sequence[float] = ()
    local: tuple[int, ...] = ()
    remote: tuple[int, ...] = ()
    channel: int = -1
    transfer: float = 0.0
    latency: float = 0.0
    peer: int = -1
    sender: "_Template | None" = None
    visits: bool = False


class _Table:
    """The schedule in numbers.

    All micro-batches depend on each other in the same way, so what an action needs is looked up
    once per *template* (stage, kind, chunk, sub-sequence). An I is noted as its B: who waits for a
    gradient cannot tell which of the two made it.
    """

    def __init__(self, schedule: Schedule, costs: Costs | CostsByMicroBatch, link: Link) -> None:
        self.schedule = schedule
        self.costs, self.link = costs, link
        self.num_micro_batches = schedule.num_micro_batches
        self._places: dict[tuple[int, Action], int] = {}
        self._channels: dict[tuple[int, int, bool], int] = {}
        self._stages = [_Templates() for _ in range(schedule.num_stages)]
        self.programs = [
            [templates[kind, chunk, sub_sequence] for kind, chunk, _, sub_sequence in actions]
            for templates, actions in zip(self._stages, schedule.stages, strict=True)
        ]
        for stage, templates in enumerate(self._stages):
            for (kind, chunk, sub_sequence), template in templates.items():
                action = Action(kind, chunk, 0, sub_sequence)
                template.noted = self._place(*event(stage, action))
        for stage, templates in enumerate(self._stages):
            for (kind, chunk, sub_sequence), template in templates.items():
                self._describe(template, stage, Action(kind, chunk, 0, sub_sequence))
        # after all descriptions: an action needed but on no stage's list has a place, never a time
        self.num_places = len(self._places) * self.num_micro_batches
        self.num_channels = len(self._channels)

    def _place(self, stage: int, action: Action) -> int:
        """Return where an action is noted, given as that of micro-batch 0."""
        number = self._places.setdefault((stage, action), len(self._places))
        return number * self.num_micro_batches

    def _describe(self, template: _Template, stage: int, action: Action) -> None:
        kind = action.kind
        if kind.is_compute:
            template.durations = self._durations_of(stage, action)
            local: list[int] = []
            remote: list[int] = []
            for other, need in dependencies(self.schedule, stage, action):
                near = other == stage and not need.kind.is_send
                (local if near else remote).append(self._place(other, need))
            load = Kind.LOAD_B if kind.is_backward else Kind.LOAD_F
            if (load, action.chunk, action.sub_sequence) in self._stages[stage]:
                remote.append(self._place(stage, action.of_kind(load)))
            template.local, template.remote = tuple(local), tuple(remote)
        else:
            template.durations = [0.0] * self.num_micro_batches
        if kind.is_load or kind.is_free:
            template.visits = True
        else:
            self._connect(template, stage, action)

    def _durations_of(self, stage: int, action: Action) -> Sequence[float]:
        """Return how long a computation takes in every micro-batch."""
        costs = self.costs
        if isinstance(costs, Costs):
            return [costs.of(stage, action)] * self.num_micro_batches
        return [
            costs.of(stage, action._replace(micro_batch=k)) for k in range(self.num_micro_batches)
        ]

    def _connect(self, template: _Template, stage: int, action: Action) -> None:
        """Note over which channel the result of ``action`` leaves, if it does."""
        schedule, kind = self.schedule, action.kind
        other = None
        if schedule.lowered and not kind.is_compute:
            there, end = schedule.peer(stage, action)
            template.peer = self._place(there, end)
            template.sender = template
            if kind.is_send:
                other = there
            else:
                template.sender = self._stages[there].get((end.kind, end.chunk, end.sub_sequence))
        elif not schedule.lowered and kind is not Kind.W:
            next_part = schedule.downstream if kind is Kind.F else schedule.upstream
            target = next_part(stage, action.chunk)
            other = target[0] if target else None
        if other is None:
            return
        if other != stage:
            template.latency = self.link.latency
            template.transfer = self.link.transfer(action.sub_sequence)
        key = (stage, other, kind in (Kind.F, Kind.SEND_F))
        template.channel = self._channels.setdefault(key, len(self._channels))

    def loads(self) -> list[int]:
        """Return where the loads of each template are noted."""
        return [
            template.noted
            for templates in self._stages
            for (kind, _, _), template in templates.items()
            if kind.is_load
        ]


class _Templates(dict[Part, _Template]):
    """The templates of one stage's actions, made when first asked for."""

    def __missing__(self, part: Part) -> _Template:
        self[part] = template = _Template()
        return template


class _Run:
    """Goes through all stages' programs, from one wait to the next."""

    def __init__(self, table: _Table, visits: Visits | None) -> None:
        self.table = table
        self.visits = visits
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
        ready = list(reversed(range(len(self.steps))))
        if self.visits is not None:
            self.expect_loads()
        while ready:
            ready += self.advance(ready.pop())
            while not ready and self.visits is not None and self.copy_next(self.visits, ready):
                pass
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
        woken: list[int] = []
        now = self.free[stage]
        step = self.steps[stage]
        while step < len(program):
            template = program[step]
            micro_batch = actions[step].micro_batch
            start = now
            for base in template.remote:
                there = arrived[base + micro_batch]
                if there < 0.0:
                    waiting[base + micro_batch] = stage
                    break
                start = max(start, there)
            else:
                if any(done[base + micro_batch] < 0.0 for base in template.local):
                    break
                now = start + template.durations[micro_batch]
                done[template.noted + micro_batch] = now
                starts.append(start)
                ends.append(now)
                if template.visits:
                    self.visit(stage, step, now)
                else:
                    self.dispatch(template, micro_batch, now, woken)
                step += 1
                continue
            break
        self.free[stage] = now
        self.steps[stage] = step
        return woken

    def dispatch(self, template: _Template, micro_batch: int, now: float, woken: list[int]) -> None:
        """Send what has just been made, or what a receive just announced was waiting for."""
        if template.peer >= 0:
            other = self.done[template.peer + micro_batch]
            if other < 0.0:
                return
            now = max(now, other)
            assert template.sender is not None, "a send that has happened is on its stage's list"
            template = template.sender
        channel = template.channel
        if channel < 0:
            return
        gone = max(now, self.channel_free[channel]) + template.transfer
        self.channel_free[channel] = gone
        self.arrive(template.noted + micro_batch, gone + template.latency, woken)

    def arrive(self, place: int, there: float, woken: list[int]) -> None:
        self.arrived[place] = there
        stage = self.waiting.pop(place, None)
        if stage is not None:
            woken.append(stage)

    def expect_loads(self) -> None:
        """Let computations wait for the loads that there are, which few micro-batches have."""
        table, num_micro_batches = self.table, self.table.num_micro_batches
        for place in table.loads():
            self.arrived[place : place + num_micro_batches] = [0.0] * num_micro_batches
        for actions, program in zip(table.schedule.stages, table.programs, strict=True):
            for action, template in zip(actions, program, strict=True):
                if action.kind.is_load:
                    self.arrived[template.noted + action.micro_batch] = _NOT_YET

    def visit(self, stage: int, step: int, now: float) -> None:
        assert self.visits is not None, "loads and frees have a host link"
        self.visits.issue(stage, step, now)

    def copy_next(self, visits: Visits, ready: list[int]) -> bool:
        """Make the copy that comes next, now that all stages wait; return whether there is one."""
        copy = visits.next()
        if copy is None:
            return False
        stage, step = copy.stage, copy.place
        self.starts[stage][step], self.ends[stage][step] = copy.start, copy.end
        action = self.table.schedule.stages[stage][step]
        if action.kind.is_load:
            place = self.table.programs[stage][step].noted + action.micro_batch
            self.arrive(place, copy.end, ready)
        return True

    def set_ends_of_transfers(self) -> None:
        table = self.table
        for stage, actions in enumerate(table.schedule.stages):
            for step, action in enumerate(actions):
                if action.kind.is_compute:
                    continue
                template = table.programs[stage][step]
                if template.sender is not None:
                    place = template.sender.noted + action.micro_batch
                    self.ends[stage][step] = self.arrived[place]
