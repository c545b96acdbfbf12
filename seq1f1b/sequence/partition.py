"""Where to cut a sequence: evenly in tokens, or evenly in computation."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal, get_args

from seq1f1b.errors import Seq1F1BError
from seq1f1b.sequence.flops import PackedCost, TokenCost

BalanceMethod = Literal["average", "uniform_comp"]
BALANCE_METHODS: tuple[BalanceMethod, ...] = get_args(BalanceMethod)


class PartitionError(Seq1F1BError, ValueError):
    """The sequence cannot be cut as asked."""


def partition(
    length: int,
    num_splits: int,
    *,
    method: BalanceMethod = "average",
    cost: TokenCost | PackedCost | None = None,
    multiple: int = 1,
) -> tuple[int, ...]:
    """Cut ``length`` tokens into ``num_splits`` sub-sequences.

    ``average`` makes lengths that differ by at most one ``multiple``, the longer ones first,
    because early tokens cost less. ``uniform_comp`` puts cut i where the tokens before it hold
    i / num_splits of ``cost`` (arXiv 2406.03488, section 3.3), solved in closed form and rounded to
    ``multiple``, the number of tokens that tensor, context and sequence parallelism deal out, or
    that kernels compute, together. A ``PackedCost`` makes that the cut of one micro-batch's own
    documents.

    Returns the lengths, each a positive multiple of ``multiple``; they sum to ``length``.
    Raises PartitionError when there are fewer tokens than that takes.
    """
    if num_splits < 1:
        raise PartitionError(f"number of splits is {num_splits}; it must be at least 1")
    if multiple < 1:
        raise PartitionError(f"lengths cannot be multiples of {multiple}")
    if length % multiple:
        raise PartitionError(
            f"sequence length {length} is not a multiple of {multiple}, "
            f"which every sub-sequence must be"
        )
    units = length // multiple
    if units < num_splits:
        raise PartitionError(
            f"{num_splits} splits of at least {multiple} token(s) each need a sequence of "
            f"{num_splits * multiple} tokens; it has {length}"
        )
    if method == "average":
        shorter, num_longer = divmod(units, num_splits)
        cuts = [shorter * i + min(i, num_longer) for i in range(num_splits + 1)]
    elif method == "uniform_comp":
        if cost is None:
            raise PartitionError("uniform_comp needs the cost of a token")
        total = cost.of_first(length)
        ideal = [
            cost.tokens_within(total * i / num_splits) / multiple for i in range(num_splits + 1)
        ]
        cuts = _round_cuts(ideal, units)
    else:
        raise PartitionError(
            f"unknown balance method {method!r}; choose one of {', '.join(BALANCE_METHODS)}"
        )
    return tuple((after - before) * multiple for before, after in pairwise(cuts))


def imbalance(lengths: Sequence[int], cost: TokenCost | PackedCost) -> float:
    """Return by how much the dearest sub-sequence exceeds the mean: 0.0 is perfect balance."""
    cuts = [0, *accumulate(lengths)]
    costs = [cost.of(start, stop) for start, stop in pairwise(cuts)]
    return max(costs) * len(costs) / sum(costs) - 1.0


def _round_cuts(ideal: list[float], units: int) -> list[int]:
    """Round cut points to whole units and keep at least one unit between neighbours."""
    last = len(ideal) - 1
    cuts = [0]
    for i in range(1, last):
        lowest = cuts[-1] + 1
        highest = units - (last - i)
        cuts.append(min(max(round(ideal[i]), lowest), highest))
    cuts.append(units)
    return cuts
