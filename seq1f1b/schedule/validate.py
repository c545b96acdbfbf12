"""Prove that a schedule is complete, respects every dependency and cannot deadlock."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from seq1f1b.errors import Seq1F1BError
from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.edges import Event, dependencies, event
from seq1f1b.schedule.residency import residency_faults
from seq1f1b.schedule.schedule import Schedule


class ScheduleError(Seq1F1BError, ValueError):
    """A schedule that would compute something wrong, run out of memory or never end."""


def validate(schedule: Schedule, *, max_live: int | Sequence[int] | None = None) -> None:
    """Raise ScheduleError unless ``schedule`` can run to its end, even if every send blocks.

    Checks that each stage computes each sub-sequence exactly once forward and, if any stage goes
    backward, once backward; that sends and receives pair up in the same order at both ends of each
    link; that the stages, run in their own orders, never wait for each other in a circle (this
    covers the order of sub-sequences inside a stage, which carry keys, values and their gradients);
    that model chunks which visit the device are there whenever they compute, each in its own slot,
    never two in one, and leave with their gradients;
    and, with ``max_live`` (of all stages, or of each), that no stage holds more sub-sequences than
    that between forward and backward. The message names the stage, the step, the action and what
    it waits for.
    """
    trains = any(a.kind in (Kind.B, Kind.I) for actions in schedule.stages for a in actions)
    for stage, actions in enumerate(schedule.stages):
        _check_complete(schedule, stage, actions, trains=trains)
    if schedule.lowered:
        _check_pairs(schedule)
    for stage in range(schedule.num_stages):
        for step, fault in residency_faults(schedule, stage):
            raise ScheduleError(f"{_at(schedule, stage, step)}: {fault}")
    _run(schedule)
    if max_live is not None:
        limits = [max_live] * schedule.num_stages if isinstance(max_live, int) else max_live
        _check_live(schedule, limits)


def peak_live(schedule: Schedule) -> tuple[int, ...]:
    """Return per stage how many (chunk, sub-sequence) activations it holds at most.

    An activation lives from its F to the end of its B, or of its W where the backward is split.
    """
    return tuple(max(_live(actions), default=0) for actions in schedule.stages)


def _live(actions: Iterable[Action]) -> Iterator[int]:
    """Yield how many activations a stage holds while each action runs."""
    live = 0
    for action in actions:
        if action.kind is Kind.F:
            live += 1
        yield live
        if action.kind in (Kind.B, Kind.W):
            live -= 1


def _check_live(schedule: Schedule, limits: Sequence[int]) -> None:
    for stage, (actions, limit) in enumerate(zip(schedule.stages, limits, strict=True)):
        for step, live in enumerate(_live(actions)):
            if live > limit:
                raise ScheduleError(
                    f"{_at(schedule, stage, step)}: the stage holds {live} sub-sequences at once; "
                    f"at most {limit} are allowed"
                )


def _check_complete(
    schedule: Schedule, stage: int, actions: tuple[Action, ...], *, trains: bool
) -> None:
    parts = {
        (chunk, micro_batch, sub_sequence)
        for chunk in range(schedule.num_chunks)
        for micro_batch in range(schedule.num_micro_batches)
        for sub_sequence in range(schedule.num_splits)
    }
    counts = Counter(actions)
    for step, action in enumerate(actions):
        if action[1:] not in parts:
            raise ScheduleError(f"{_at(schedule, stage, step)}: there is no such part of the model")
        if counts[action] > 1:
            raise ScheduleError(f"{_at(schedule, stage, step)}: runs {counts[action]} times")
    for part in sorted(parts):
        have = {kind for kind in (Kind.F, Kind.B, Kind.I, Kind.W) if Action(kind, *part) in counts}
        if have == {Kind.F, Kind.B} or have == {Kind.F, Kind.I, Kind.W}:
            continue
        if have == {Kind.F} and not trains:
            continue
        missing = "F" if Kind.F not in have else "backward (B, or I and W)"
        raise ScheduleError(
            f"{schedule.name}: stage {stage} needs exactly one F and one B (or I and W) of "
            f"{Action(Kind.F, *part)}; it has {', '.join(sorted(have)) or 'none'}: check its "
            f"{missing}"
        )


def _check_pairs(schedule: Schedule) -> None:
    """Compare, link by link, what is sent with what is received."""
    sent: dict[tuple[int, int, Kind], list[Action]] = {}
    received: dict[tuple[int, int, Kind], list[Action]] = {}
    for stage, actions in enumerate(schedule.stages):
        for step, action in enumerate(actions):
            if not (action.kind.is_send or action.kind.is_receive):
                continue
            try:
                other, counterpart = schedule.peer(stage, action)
            except ValueError as error:
                raise ScheduleError(f"{_at(schedule, stage, step)}: {error}") from None
            if action.kind.is_send:
                sent.setdefault((stage, other, action.kind), []).append(counterpart)
            else:
                received.setdefault((other, stage, counterpart.kind), []).append(action)
    for source, target, kind in sorted(sent.keys() | received.keys()):
        expected = sent.get((source, target, kind), [])
        announced = received.get((source, target, kind), [])
        for position in range(max(len(expected), len(announced))):
            out = expected[position] if position < len(expected) else None
            into = announced[position] if position < len(announced) else None
            if out != into:
                raise ScheduleError(
                    f"{schedule.name}: link from stage {source} to stage {target}, transfer "
                    f"{position}: the receiver announces {into or 'nothing'} where the sender "
                    f"sends {out or 'nothing'}"
                )


def _run(schedule: Schedule) -> None:
    """Run every stage as far as it goes, again and again, until all are through or all wait."""
    done: set[Event] = set()
    steps = [0] * schedule.num_stages
    progress = True
    while progress:
        progress = False
        for stage, actions in enumerate(schedule.stages):
            while steps[stage] < len(actions):
                action = actions[steps[stage]]
                if not done.issuperset(dependencies(schedule, stage, action)):
                    break
                done.add(event(stage, action))
                steps[stage] += 1
                progress = True
    stuck = [stage for stage, step in enumerate(steps) if step < len(schedule.stages[stage])]
    if stuck:
        raise ScheduleError(_explain_deadlock(schedule, steps, stuck, done))


def _explain_deadlock(
    schedule: Schedule, steps: list[int], stuck: list[int], done: set[Event]
) -> str:
    lines = [f"{schedule.name}: the schedule stops for ever:"]
    for stage in stuck:
        action = schedule.stages[stage][steps[stage]]
        waits = [need for need in dependencies(schedule, stage, action) if need not in done]
        needs = ", ".join(f"{need} on stage {other}" for other, need in waits)
        lines.append(f"  {_at(schedule, stage, steps[stage])}: waits for {needs}")
    return "\n".join(lines)


def _at(schedule: Schedule, stage: int, step: int) -> str:
    return f"{schedule.name}: stage {stage}, step {step}, {schedule.stages[stage][step]}"
