"""Where to cut a sequence so that the step is shortest, whatever stage sets the pace.

``uniform_comp`` makes sub-sequences equal for the mean layer. The stage with the output layer,
which costs the same for every token, is then unequal; it sets the pace in the steady phase, while
the others decide how long the pipeline takes to fill. Here cuts are compared by the simulated step.
"""

from collections.abc import Callable, Iterator

from seq1f1b.planner.setting import Setting
from seq1f1b.sequence import PartitionError, TokenCost, partition

_STRENGTHS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5)
_STRIDES = (8, 4, 2, 1)
_MOST_TRIED = 150
Lengths = tuple[int, ...]


def fastest_cut(
    setting: Setting, seconds: Callable[[Setting], float], *, longest: int | None = None
) -> Setting:
    """Return the setting with the lengths of sub-sequences whose step ``seconds`` finds shortest.

    It tries cuts between equal tokens and equal computation and somewhat beyond, then moves of
    single cuts by ever smaller strides, down to the multiple that lengths must be of. ``longest``
    caps the lengths: sub-sequences of similar length fragment memory less, and the first one, which
    is the longest under equal computation, holds less.
    """
    search = _Search(setting, seconds, longest)
    for strength in _STRENGTHS:
        search.try_cut(_weighted(setting, strength, longest))
    if search.known:
        search.refine()
    return setting.with_cuts(search.best)


def capped_cuts(setting: Setting) -> Iterator[Lengths]:
    """Yield cuts of equal computation whose lengths stay within ever smaller caps."""
    mean = setting.seq_length / setting.num_splits
    for factor in (1.5, 1.25, 1.1, 1.0):
        cap = -(-int(mean * factor) // setting.multiple) * setting.multiple
        cut = _weighted(setting, 1.0, cap)
        if cut is not None:
            yield cut


class _Search:
    """The best cut so far."""

    def __init__(
        self, setting: Setting, seconds: Callable[[Setting], float], longest: int | None
    ) -> None:
        self.setting, self.seconds, self.longest = setting, seconds, longest
        self.multiple = setting.multiple
        self.known: dict[Lengths, float] = {}
        self.best: Lengths = setting.lengths

    def try_cut(self, lengths: Lengths | None) -> bool:
        """Simulate a cut; return whether it is the best so far."""
        if lengths is None or min(lengths) < self.multiple or lengths in self.known:
            return False
        if self.longest is not None and max(lengths) > self.longest:
            return False
        self.known[lengths] = self.seconds(self.setting.with_cuts(lengths))
        if self.best not in self.known or self.known[lengths] < self.known[self.best]:
            self.best = lengths
            return True
        return False

    def refine(self) -> None:
        """Move one cut at a time as long as that helps."""
        for stride in _STRIDES:
            unit = stride * self.multiple * max(1, self.setting.seq_length // (256 * self.multiple))
            improved = True
            while improved and len(self.known) < _MOST_TRIED:
                improved = any(self.try_cut(moved) for moved in _moves(self.best, unit))


def _moves(lengths: Lengths, unit: int) -> list[Lengths]:
    """Return all cuts that differ by one boundary moved by ``unit`` tokens."""
    moved = []
    for index in range(len(lengths) - 1):
        for step in (unit, -unit):
            one = list(lengths)
            one[index] += step
            one[index + 1] -= step
            moved.append(tuple(one))
    return moved


def _weighted(setting: Setting, strength: float, longest: int | None) -> Lengths | None:
    """Cut for equal computation with attention weighed by ``strength``, within a cap."""
    cost = setting.model.token_cost(setting.vocabulary)
    weighed = TokenCost(cost.linear, cost.attention * strength)
    try:
        lengths = partition(
            setting.seq_length,
            setting.num_splits,
            method="uniform_comp",
            cost=weighed,
            multiple=setting.multiple,
        )
    except PartitionError:
        return None
    return lengths if longest is None else _within(lengths, longest, setting.multiple)


def _within(lengths: Lengths, longest: int, multiple: int) -> Lengths | None:
    """Pass what exceeds a cap on to the next sub-sequences; None where they cannot hold it."""
    cap = longest // multiple * multiple
    if cap * len(lengths) < sum(lengths):
        return None
    capped, left = [], 0
    for length in lengths:
        wanted = length + left
        capped.append(min(wanted, cap))
        left = wanted - capped[-1]
    for index in reversed(range(len(capped))):
        room = min(left, cap - capped[index])
        capped[index] += room
        left -= room
    return tuple(capped)
