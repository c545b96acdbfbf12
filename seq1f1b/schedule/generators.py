"""The schedules, each a pure function of (stages, chunks, micro-batches, splits).

Forwards go through a micro-batch from its first sub-sequence to its last, because each attends to
the keys and values of those before it; backwards go from the last to the first, because those
keys and values collect gradients from the sub-sequences behind them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.schedule import Schedule


def one_f_one_b(num_stages: int, num_micro_batches: int, num_splits: int = 1) -> Schedule:
    """1F1B on whole micro-batches, or Seq1F1B on their sub-sequences.

    Stage i runs min(p - i - 2 + s, m s) forwards of warm-up (arXiv 2406.03488, section 3.2), which
    with one split is 1F1B's min(p - i - 1, m) (arXiv 2104.04473, section 2.2).
    """
    name = "1f1b" if num_splits == 1 else "seq1f1b"
    forwards, backwards = _orders(1, num_micro_batches, num_splits)

    def actions(stage: int) -> tuple[Action, ...]:
        num_warmup = num_splits - 1 + num_stages - stage - 1
        return _alternate(forwards, backwards, num_warmup)

    return _build(name, num_stages, 1, num_micro_batches, num_splits, actions)


def interleaved(
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    num_splits: int = 1,
    group: int | None = None,
) -> Schedule:
    """1F1B over several model chunks a stage (arXiv 2104.04473, section 2.2), on sub-sequences.

    A stage takes turns: all sub-sequences of a few micro-batches through its first chunk, then
    through its next, and so on. ``group`` is the number of sub-sequences a turn (with one split:
    of micro-batches), rounded up to whole micro-batches, and the number of stages unless given:
    with that many, the first of them has been through all stages when its next chunk's turn comes.
    Micro-batches that are left over make a turn of their own if they are enough for that, as in
    Megatron-Core's schedule; otherwise the turns before take them in, so that no stage waits.

    Warm-up lasts until the last stage has forwarded a whole micro-batch through its last chunk, and
    2 forwards longer for each stage before it, so that the first backward finds its gradient there:
    (num_chunks - 1) * group + num_splits - 1 + 2 * (num_stages - stage - 1) forwards.

    Raises ValueError for several chunks on a single stage, which would send to itself, and for a
    ``group`` below the number of stages, whose warm-up would be too short for the first backward.
    """
    if num_chunks == 1:
        return one_f_one_b(num_stages, num_micro_batches, num_splits)
    if num_stages == 1:
        raise ValueError(f"{num_chunks} model chunks on one stage: interleaving needs 2 stages")
    if group is not None and group < num_stages:
        raise ValueError(
            f"turns of {group} on {num_stages} stages: a turn takes at least one sub-sequence "
            f"(with one split: micro-batch) for each stage, or the stages wait for each other"
        )
    name = "1f1b-interleaved" if num_splits == 1 else "seq1f1b-interleaved"
    turns = _turns(num_stages, num_micro_batches, num_splits, group or num_stages)
    forwards, backwards = _orders(num_chunks, num_micro_batches, num_splits, turns)
    last_warmup = (num_chunks - 1) * turns[0] + num_splits - 1

    def actions(stage: int) -> tuple[Action, ...]:
        return _alternate(forwards, backwards, last_warmup + 2 * (num_stages - stage - 1))

    return _build(name, num_stages, num_chunks, num_micro_batches, num_splits, actions)


def zb_h1(
    num_stages: int,
    num_micro_batches: int,
    num_splits: int = 1,
    max_deferred: int | None = None,
) -> Schedule:
    """Zero Bubble's ZB-H1 (arXiv 2401.10241, section 2.3), or Seq1F1B ZB-H1 on sub-sequences.

    Forwards and backwards go in (Seq)1F1B's order, but a backward is split: I hands the input
    gradient on at once, and W, the weight gradient, waits until i more I have run on stage i. That
    fills the last waits of the step, and it is as many sub-sequences as stage i holds fewer than
    the first under (Seq)1F1B: every stage peaks at the first one's p + s - 1. At most
    ``max_deferred`` weight gradients wait at once, for less memory and more idle time.

    Idle time is (p - 1)(F + I - W) / s where F = I = W and there are at least p + s - 1
    sub-sequences. The first stage defers nothing and hands no gradient on: its backwards stay
    whole.
    """
    if max_deferred is not None and max_deferred < 0:
        raise ValueError(f"{max_deferred} deferred weight gradients: it must be 0 or more")
    name = "zb-h1" if num_splits == 1 else "seq1f1b-zb-h1"
    plain = one_f_one_b(num_stages, num_micro_batches, num_splits)

    def actions(stage: int) -> tuple[Action, ...]:
        num_deferred = stage if max_deferred is None else min(stage, max_deferred)
        whole = plain.stages[stage]
        return tuple(_split_backwards(whole, num_deferred)) if stage else whole

    return _build(name, num_stages, 1, num_micro_batches, num_splits, actions)


def gpipe(num_stages: int, num_micro_batches: int, num_splits: int = 1) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965)."""
    forwards, backwards = _orders(1, num_micro_batches, num_splits)
    return _build(
        "gpipe",
        num_stages,
        1,
        num_micro_batches,
        num_splits,
        lambda stage: (*forwards, *backwards),
    )


def forward_only(
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    num_splits: int = 1,
    group: int | None = None,
) -> Schedule:
    """Evaluation: forwards and nothing else, ``group`` sub-sequences a turn.

    Those are as many as stages unless given.
    """
    num_units = num_micro_batches * num_splits
    size = group or num_stages
    turns = [min(size, num_units - first) for first in range(0, num_units, size)]
    forwards, _ = _orders(num_chunks, num_micro_batches, num_splits, turns)
    return _build(
        "forward-only",
        num_stages,
        num_chunks,
        num_micro_batches,
        num_splits,
        lambda stage: tuple(forwards),
    )


def _turns(num_stages: int, num_micro_batches: int, num_splits: int, group: int) -> Sequence[int]:
    """Return the number of sub-sequences of each turn, whole micro-batches, no turn growing."""
    size = -(-group // num_splits)
    num_turns, left_over = divmod(num_micro_batches, size)
    if left_over * num_splits >= num_stages or num_turns == 0:
        sizes = [size] * num_turns + [left_over]
    else:
        smaller, num_larger = divmod(num_micro_batches, num_turns)
        sizes = [smaller + (turn < num_larger) for turn in range(num_turns)]
    return [size * num_splits for size in sizes]


def _orders(
    num_chunks: int, num_micro_batches: int, num_splits: int, turns: Sequence[int] | None = None
) -> tuple[list[Action], list[Action]]:
    """Order all forwards and all backwards of one stage; without ``turns``, in a single turn."""
    micro_batches = range(num_micro_batches)
    ascending = [(m, j) for m in micro_batches for j in range(num_splits)]
    descending = [(m, j) for m in micro_batches for j in reversed(range(num_splits))]
    chunks = range(num_chunks)
    turns = turns or [len(ascending)]
    return (
        [Action(Kind.F, c, m, j) for c, m, j in _by_turns(chunks, ascending, turns)],
        [Action(Kind.B, c, m, j) for c, m, j in _by_turns(chunks[::-1], descending, turns)],
    )


def _by_turns(
    chunks: Sequence[int], units: Sequence[tuple[int, int]], turns: Sequence[int]
) -> list[tuple[int, int, int]]:
    return [
        (chunk, *unit)
        for first, size in zip(accumulate(turns, initial=0), turns, strict=False)
        for chunk in chunks
        for unit in units[first : first + size]
    ]


def _alternate(
    forwards: Sequence[Action], backwards: Sequence[Action], num_warmup: int
) -> tuple[Action, ...]:
    """Run ``num_warmup`` forwards, then forward and backward in turn, then the backwards left."""
    num_warmup = min(num_warmup, len(forwards))
    steady = [
        action for pair in zip(forwards[num_warmup:], backwards, strict=False) for action in pair
    ]
    cooldown = backwards[len(forwards) - num_warmup :]
    return (*forwards[:num_warmup], *steady, *cooldown)


def _split_backwards(actions: Sequence[Action], num_deferred: int) -> Iterator[Action]:
    """Replace each B by its I and, when ``num_deferred`` more I have run, its W."""
    waiting: deque[Action] = deque()
    for action in actions:
        if action.kind is not Kind.B:
            yield action
            continue
        yield action.of_kind(Kind.I)
        waiting.append(action.of_kind(Kind.W))
        if len(waiting) > num_deferred:
            yield waiting.popleft()
    yield from waiting


def _build(
    name: str,
    num_stages: int,
    num_chunks: int,
    num_micro_batches: int,
    num_splits: int,
    actions: Callable[[int], tuple[Action, ...]],
) -> Schedule:
    stages = tuple(actions(stage) for stage in range(num_stages))
    return Schedule(name, num_stages, num_chunks, num_micro_batches, num_splits, stages)
