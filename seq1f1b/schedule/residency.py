"""Model chunks that visit the device: when each is loaded, where, and when it leaves."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby

from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.schedule import Schedule


@dataclass(frozen=True)
class Residency:
    """One visit of a model chunk: its computations ``first`` to ``last``, by place in the list.

    load and free: the actions around it.
    """

    chunk: int
    first: int
    last: int
    load: Action
    free: Action

    @property
    def goes_backward(self) -> bool:
        """Whether gradients are computed in it."""
        return self.free.kind is Kind.FREE_B


def visiting(schedule: Schedule, num_slots: int, *, prefetch: bool = False) -> Schedule:
    """Return a lowered ``schedule`` whose model chunks visit ``num_slots`` slots of the device.

    A chunk has one slot for good: between its forward and backward it must come back to the same
    addresses, to which saved tensors point. Slots are dealt so that there are few loads: with one
    turn of all sub-sequences through a chunk before the next, chunk c takes slot c mod num_slots,
    which of v chunks loads 2 v - num_slots a step. That is what evicting the chunk needed latest
    loads, and so is, but for 2 loads at most, what several turns load: see ``num_loads``.

    A chunk is loaded before the computation that needs it or, with ``prefetch``, as soon as the one
    before it has left its slot. It leaves after its last computation before its slot's next chunk.

    Raises ValueError for a schedule that is not lowered or whose backwards are split, and unless
    there are 1 to ``num_chunks`` slots.
    """
    if not schedule.lowered:
        raise ValueError("model chunks are loaded in lowered schedules")
    if any(a.kind in (Kind.I, Kind.W) for actions in schedule.stages for a in actions):
        raise ValueError(f"{schedule.name} splits backwards: model chunks cannot leave between")
    if not 1 <= num_slots <= schedule.num_chunks:
        raise ValueError(
            f"{num_slots} model chunks on the device of {schedule.num_chunks}: "
            f"from 1 to {schedule.num_chunks} are possible"
        )
    stages, slots = [], []
    for actions in schedule.stages:
        own = _deal(_chunk_runs(actions), schedule.num_chunks, num_slots)
        stages.append(tuple(_with_visits(actions, own, prefetch=prefetch)))
        slots.append(tuple(own))
    return replace(schedule, stages=tuple(stages), slots=tuple(slots), num_slots=num_slots)


def num_loads(num_chunks: int, num_slots: int, num_turns: int = 1) -> int:
    """Return the loads of a stage and step where what is needed latest is evicted.

    Forward through v chunks loads each, and backward all but the k that are still there; each
    further turn loads what is not, once each way: 2 v - k + 2 (T - 1)(v - k). Holds for one turn,
    and for several from 2 slots on. ``visiting`` loads as many, or with several turns 2 more.
    """
    absent = num_chunks - num_slots
    return num_chunks + absent + 2 * (num_turns - 1) * absent


def residencies(actions: Sequence[Action], slots: Sequence[int]) -> list[Residency]:
    """Return the visits that a stage's computations make necessary, in order of their first one."""
    visits: list[list[int]] = []
    resident: dict[int, list[int]] = {}
    for place, action in enumerate(actions):
        if not action.kind.is_compute:
            continue
        there = resident.get(slots[action.chunk])
        if there is None or actions[there[0]].chunk != action.chunk:
            there = resident[slots[action.chunk]] = []
            visits.append(there)
        there.append(place)
    return [_residency(actions, places) for places in visits]


def _residency(actions: Sequence[Action], places: Sequence[int]) -> Residency:
    """A FREE names the last backward of the visit, if there is one, else the last forward."""
    first, last = actions[places[0]], actions[places[-1]]
    backwards = [actions[place] for place in places if actions[place].kind.is_backward]
    load = first.of_kind(Kind.LOAD_B if first.kind.is_backward else Kind.LOAD_F)
    free = backwards[-1].of_kind(Kind.FREE_B) if backwards else last.of_kind(Kind.FREE_F)
    return Residency(first.chunk, places[0], places[-1], load, free)


def _with_visits(
    actions: Sequence[Action], slots: Sequence[int], *, prefetch: bool
) -> Iterator[Action]:
    loads: dict[int, list[Action]] = {}
    frees: dict[int, Action] = {}
    free_from: dict[int, int] = {}
    for visit in residencies(actions, slots):
        earliest = free_from.get(slots[visit.chunk], 0)
        loads.setdefault(earliest if prefetch else visit.first, []).append(visit.load)
        frees[visit.last] = visit.free
        free_from[slots[visit.chunk]] = visit.last + 1
    for place, action in enumerate(actions):
        yield from loads.get(place, ())
        yield action
        if place in frees:
            yield frees[place]


def _chunk_runs(actions: Sequence[Action]) -> list[int]:
    """Return the chunks that compute, without repetitions."""
    return [chunk for chunk, _ in groupby(a.chunk for a in actions if a.kind.is_compute)]


def _deal(runs: Sequence[int], num_chunks: int, num_slots: int) -> list[int]:
    """Return a slot for each chunk, moved and swapped as long as that saves loads."""
    chunks = range(num_chunks)
    starts = (
        [chunk % num_slots for chunk in chunks],
        [chunk * num_slots // num_chunks for chunk in chunks],
        [min(chunk, num_chunks - 1 - chunk) % num_slots for chunk in chunks],
    )
    return min((_improved(runs, slots, num_slots) for slots in starts), key=_loads_of(runs))


def _improved(runs: Sequence[int], slots: list[int], num_slots: int) -> list[int]:
    loads = _loads_of(runs)
    while True:
        others = [
            [*slots[:chunk], slot, *slots[chunk + 1 :]]
            for chunk in range(len(slots))
            for slot in range(num_slots)
        ]
        for one, other in combinations(range(len(slots)), 2):
            swapped = list(slots)
            swapped[one], swapped[other] = slots[other], slots[one]
            others.append(swapped)
        best = min(others, key=loads)
        if loads(best) >= loads(slots):
            return slots
        slots = best


def _loads_of(runs: Sequence[int]) -> Callable[[Sequence[int]], int]:
    def count(slots: Sequence[int]) -> int:
        there: dict[int, int] = {}
        loads = 0
        for chunk in runs:
            if there.get(slots[chunk]) != chunk:
                there[slots[chunk]] = chunk
                loads += 1
        return loads

    return count


def residency_faults(schedule: Schedule, stage: int) -> Iterator[tuple[int, str]]:
    """Yield what is wrong with the visits of ``stage``, each with its step."""
    actions = schedule.stages[stage]
    if schedule.slots is None or schedule.num_slots is None:
        for step, action in enumerate(actions):
            if action.kind.is_load or action.kind.is_free:
                yield step, "model chunks stay on the device in this schedule"
        return
    slots = schedule.slots[stage]
    there: dict[int, tuple[Action, list[Action]]] = {}  # by slot: the load, what was computed
    for step, action in enumerate(actions):
        kind, chunk = action.kind, action.chunk
        slot = slots[chunk]
        load, computed = there.get(slot, (None, []))
        if kind.is_load:
            if not 0 <= slot < schedule.num_slots:
                yield step, f"slot {slot} of {schedule.num_slots}"
            if load is not None:
                yield step, f"chunk {load.chunk} is still in slot {slot}, since {load}"
            there[slot] = action, []
        elif kind.is_compute or kind.is_free:
            if load is None or load.chunk != chunk:
                yield step, f"chunk {chunk} is not on the device"
                return
            if kind.is_compute and not computed and load[1:] != action[1:]:
                yield step, f"the first after {load} ought to be of what it names"
            if kind.is_free:
                if why := _wrong_free(action, computed):
                    yield step, why
                del there[slot]
            else:
                computed.append(action)
    for load, _ in there.values():
        yield len(actions) - 1, f"chunk {load.chunk} never leaves the device after {load}"


def _wrong_free(free: Action, computed: Sequence[Action]) -> str | None:
    """Return why ``free`` does not fit what was computed since the load."""
    backwards = [action for action in computed if action.kind.is_backward]
    if not computed:
        return f"chunk {free.chunk} leaves without having computed"
    if backwards and free.kind is Kind.FREE_F:
        return f"chunk {free.chunk} leaves without the gradients of {backwards[-1]}"
    if not backwards and free.kind is Kind.FREE_B:
        return f"chunk {free.chunk} has computed no gradients to take out"
    if free[1:] != (backwards or computed)[-1][1:]:
        return f"the last of the visit is {(backwards or computed)[-1]}"
    return None
