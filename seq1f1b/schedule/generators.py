"""The schedules, each a pure function of (stages, chunks, micro-batches, splits).

Forwards go through a micro-batch from its first sub-sequence to its last, because each attends to
the keys and values of those before it; backwards go from the last to the first, because those
keys and values collect gradients from the sub-sequences behind them.
"""

from collections.abc import Callable, Sequence

from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.plan import Schedule


def one_f_one_b(num_stages: int, num_micro_batches: int, num_splits: int = 1) -> Schedule:
    """1F1B on whole micro-batches, or Seq1F1B on their sub-sequences.

    Stage i runs min(p - i - 2 + s, m s) forwards of warm-up (arXiv 2406.03488, section 3.2), which
    with one split is 1F1B's min(p - i - 1, m) (arXiv 2104.04473, section 2.2).
    """
    name = "1f1b" if num_splits == 1 else "seq1f1b"
    forwards, backwards = _orders(1, num_micro_batches, num_splits, group=1)

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

    Each stage runs ``group`` sub-sequences (with one split: micro-batches) of one chunk before it
    goes on to the next chunk; ``group`` is the number of stages unless given. Warm-up lasts until
    the last stage has forwarded a whole micro-batch through its last chunk, and 2 forwards longer
    for each stage before it, so that the first backward finds its gradient there.
    """
    if num_chunks == 1:
        return one_f_one_b(num_stages, num_micro_batches, num_splits)
    name = "1f1b-interleaved" if num_splits == 1 else "seq1f1b-interleaved"
    forwards, backwards = _orders(
        num_chunks, num_micro_batches, num_splits, group=group or num_stages
    )
    first_backward = forwards.index(backwards[0].of_kind(Kind.F))

    def actions(stage: int) -> tuple[Action, ...]:
        return _alternate(forwards, backwards, first_backward + 2 * (num_stages - stage - 1))

    return _build(name, num_stages, num_chunks, num_micro_batches, num_splits, actions)


def gpipe(num_stages: int, num_micro_batches: int, num_splits: int = 1) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965)."""
    forwards, backwards = _orders(1, num_micro_batches, num_splits, group=1)
    return _build(
        "gpipe",
        num_stages,
        1,
        num_micro_batches,
        num_splits,
        lambda stage: (*forwards, *backwards),
    )


def forward_only(
    num_stages: int, num_chunks: int, num_micro_batches: int, num_splits: int = 1
) -> Schedule:
    """Evaluation: forwards and nothing else."""
    forwards, _ = _orders(num_chunks, num_micro_batches, num_splits, group=num_stages)
    return _build(
        "forward-only",
        num_stages,
        num_chunks,
        num_micro_batches,
        num_splits,
        lambda stage: tuple(forwards),
    )


def _orders(
    num_chunks: int, num_micro_batches: int, num_splits: int, group: int
) -> tuple[list[Action], list[Action]]:
    """Order all forwards and all backwards of one stage, ``group`` sub-sequences a turn."""
    micro_batches = range(num_micro_batches)
    ascending = [(m, j) for m in micro_batches for j in range(num_splits)]
    descending = [(m, j) for m in micro_batches for j in reversed(range(num_splits))]
    chunks = range(num_chunks)
    return (
        [Action(Kind.F, c, m, j) for c, m, j in _by_turns(chunks, ascending, group)],
        [Action(Kind.B, c, m, j) for c, m, j in _by_turns(chunks[::-1], descending, group)],
    )


def _by_turns(
    chunks: Sequence[int], units: Sequence[tuple[int, int]], group: int
) -> list[tuple[int, int, int]]:
    return [
        (chunk, *unit)
        for first in range(0, len(units), group)
        for chunk in chunks
        for unit in units[first : first + group]
    ]


def _alternate(
    forwards: Sequence[Action], backwards: Sequence[Action], num_warmup: int
) -> tuple[Action, ...]:
    """Run ``num_warmup`` forwards, then forward and backward in turn, then the backwards left."""
    num_warmup = min(num_warmup, len(forwards))
    steady = [
        action
        for pair in zip(forwards[num_warmup:], backwards, strict=False)
        for action in pair
    ]
    cooldown = backwards[len(forwards) - num_warmup :]
    return (*forwards[:num_warmup], *steady, *cooldown)


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
