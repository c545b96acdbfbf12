"""Orders the actions of a step by a rule: an idle stage starts the best action that it can."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from seq1f1b.schedule import Action, Kind, Schedule
from seq1f1b.simulate.costs import Costs, Link


@dataclass(frozen=True)
class Rule:
    """How a stage chooses among the actions that it could start.

    caps: sub-sequences that each stage may hold, from F to the end of B or W. in_flight: those
    between F and B or I alone. split: whether backwards are I and W. forward_first: whether F comes
    before I or B. turn: forwards go through the chunks by turns of this many sub-sequences, as do
    backwards; without, the deepest chunk's forward and the shallowest one's backward come first.
    deferred: when more W wait on a stage than this, one of them comes first; otherwise W fills
    idle time. patience: a W does not start when something else is to come within this share of its
    time.
    """

    caps: Sequence[int]
    in_flight: Sequence[int]
    split: bool = True
    forward_first: bool = False
    turn: int | None = None
    deferred: Sequence[int] | None = None
    patience: float = 0.0


@dataclass
class _Stage:
    """What a stage has done: counts of forwards and backwards per chunk, and W that wait."""

    forwards: list[int]
    backwards: list[int]
    waiting: deque[tuple[int, int]] = field(default_factory=deque)
    coming: list[float] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    free_from: float = 0.0
    live: int = 0


def order(shape: Schedule, costs: Costs, link: Link, rule: Rule) -> Schedule:
    """Return a schedule of the sizes of ``shape`` that comes of all stages following ``rule``.

    Every part of the model takes forwards in the order of micro-batches and sub-sequences, and
    backwards in the order of micro-batches and from the last sub-sequence to the first. A stage
    always keeps room for its oldest micro-batch to go through all of its chunks, so the step comes
    to an end if every stage may hold one micro-batch: num_chunks * num_splits sub-sequences.
    """
    return _ListScheduler(shape, costs, link, rule).run()


_ARRIVAL, _DECISION = 0, 1


class _ListScheduler:
    """Goes through time; at equal times everything arrives before anybody decides."""

    def __init__(self, shape: Schedule, costs: Costs, link: Link, rule: Rule) -> None:
        self.shape, self.costs, self.link, self.rule = shape, costs, link, rule
        chunks = shape.num_chunks
        self.stages = [_Stage([0] * chunks, [0] * chunks) for _ in range(shape.num_stages)]
        # how many units may start on each part, forward and backward
        self.num_parts = shape.num_stages * chunks
        self.arrived = ([0] * self.num_parts, [0] * self.num_parts)
        self.arrived[0][0] = shape.num_micro_batches * shape.num_splits
        self.link_free: dict[tuple[int, int], float] = {}
        self.events: list[tuple[float, int, int, int, int]] = [(0.0, _DECISION, 0, 0, 0)]

    def run(self) -> Schedule:
        """Return what all stages have done when nothing is left to do."""
        shape, events = self.shape, self.events
        while events:
            now, phase, place, direction, count = heappop(events)
            if phase == _DECISION:
                self.decide(place, now)
                continue
            self.arrived[direction][place] += count
            stage = place % shape.num_stages
            if self.stages[stage].free_from <= now:
                heappush(events, (now, _DECISION, stage, 0, 0))
        return shape.with_stages(
            tuple(tuple(stage.actions) for stage in self.stages), lowered=False
        )

    def decide(self, index: int, now: float) -> None:
        """Start something on a stage, if it is free and has something worth starting."""
        stage, rule = self.stages[index], self.rule
        if stage.free_from > now:
            return
        if rule.deferred is not None and len(stage.waiting) > rule.deferred[index]:
            self.run_weight_gradient(index, now)
            return
        forward = self.next_forward(index)
        if forward is not None and rule.forward_first:
            self.run_forward(index, forward, now)
            return
        backward = self.next_backward(index)
        if backward is not None:
            self.run_backward(index, backward, now)
        elif forward is not None:
            self.run_forward(index, forward, now)
        elif stage.waiting and not self.is_worth_waiting(index, now):
            self.run_weight_gradient(index, now)

    def next_forward(self, index: int) -> int | None:
        """Return the chunk whose next forward can start and comes first by the rule."""
        stage, rule, shape = self.stages[index], self.rule, self.shape
        forwards, splits = stage.forwards, shape.num_splits
        room = min(
            rule.caps[index] - stage.live,
            rule.in_flight[index] - sum(forwards) + sum(stage.backwards),
        )
        if room <= 0:
            return None
        arrived = self.arrived[0]
        ready = [
            chunk
            for chunk in range(shape.num_chunks)
            if forwards[chunk] < arrived[chunk * shape.num_stages + index]
        ]
        if shape.num_chunks > 1 and ready:
            # younger micro-batches leave room for all of the oldest that has not been through
            oldest_end = (forwards[-1] // splits + 1) * splits
            younger = sum(max(0, done - oldest_end) for done in forwards)
            most = min(rule.caps[index], rule.in_flight[index]) - shape.num_chunks * splits
            if younger >= most:
                ready = [chunk for chunk in ready if forwards[chunk] < oldest_end]
        if len(ready) < 2:
            return ready[0] if ready else None
        if rule.turn is None:
            return ready[-1]
        turn = rule.turn
        return min(ready, key=lambda chunk: (forwards[chunk] // turn, chunk))

    def next_backward(self, index: int) -> int | None:
        """Return the chunk whose next backward can start and comes first by the rule."""
        shape, backwards = self.shape, self.stages[index].backwards
        arrived = self.arrived[1]
        ready = [
            chunk
            for chunk in range(shape.num_chunks)
            if backwards[chunk] < arrived[chunk * shape.num_stages + index]
        ]
        if len(ready) < 2:
            return ready[0] if ready else None
        if self.rule.turn is None:
            return ready[0]
        turn = self.rule.turn
        return min(ready, key=lambda chunk: (backwards[chunk] // turn, -chunk))

    def is_worth_waiting(self, index: int, now: float) -> bool:
        """Whether something else can start long before the next W would be over."""
        coming = self.stages[index].coming
        while coming and coming[0] <= now:
            heappop(coming)
        if not coming or not self.rule.patience:
            return False
        chunk, unit = self.stages[index].waiting[0]
        weight = self.costs.of(index, self.action(Kind.W, chunk, unit))
        return coming[0] - now < self.rule.patience * weight

    def run_forward(self, index: int, chunk: int, now: float) -> None:
        """Start a forward; the last part's micro-batches turn round when they are whole."""
        shape, stage = self.shape, self.stages[index]
        unit = stage.forwards[chunk]
        stage.forwards[chunk] += 1
        stage.live += 1
        end = self.start(index, Kind.F, chunk, unit, now)
        part = chunk * shape.num_stages + index
        if part < self.num_parts - 1:
            self.send(index, part + 1, 0, unit, end)
        elif (unit + 1) % shape.num_splits == 0:
            heappush(self.events, (end, _ARRIVAL, part, 1, shape.num_splits))

    def run_backward(self, index: int, chunk: int, now: float) -> None:
        """Start an I, whose W then waits, or a whole B."""
        stage = self.stages[index]
        micro_batch, done = divmod(stage.backwards[chunk], self.shape.num_splits)
        unit = (micro_batch + 1) * self.shape.num_splits - 1 - done
        stage.backwards[chunk] += 1
        if self.rule.split:
            stage.waiting.append((chunk, unit))
        else:
            stage.live -= 1
        end = self.start(index, Kind.I if self.rule.split else Kind.B, chunk, unit, now)
        part = chunk * self.shape.num_stages + index
        if part > 0:
            self.send(index, part - 1, 1, unit, end)

    def run_weight_gradient(self, index: int, now: float) -> None:
        """Start the W that has waited longest."""
        stage = self.stages[index]
        stage.live -= 1
        self.start(index, Kind.W, *stage.waiting.popleft(), now)

    def start(self, index: int, kind: Kind, chunk: int, unit: int, now: float) -> float:
        """Add an action to a stage's list; return when it ends."""
        stage = self.stages[index]
        action = self.action(kind, chunk, unit)
        stage.actions.append(action)
        stage.free_from = now + self.costs.of(index, action)
        heappush(self.events, (stage.free_from, _DECISION, index, 0, 0))
        return stage.free_from

    def action(self, kind: Kind, chunk: int, unit: int) -> Action:
        """Return the action of a unit."""
        return Action(kind, chunk, *divmod(unit, self.shape.num_splits))

    def send(self, index: int, target: int, direction: int, unit: int, end: float) -> None:
        """Let the tensor made at ``end`` travel to a part of the model on another stage."""
        gone = max(end, self.link_free.get((index, direction), 0.0))
        gone += self.link.transfer(unit % self.shape.num_splits)
        self.link_free[index, direction] = gone
        arrival = gone + self.link.latency
        heappush(self.events, (arrival, _ARRIVAL, target, direction, 1))
        heappush(self.stages[target % self.shape.num_stages].coming, arrival)
