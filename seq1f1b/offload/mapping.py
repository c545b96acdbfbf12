"""Which GPU takes which stage, so that neighbours in the pipeline do not share a PCIe link."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from seq1f1b.offload.topology import Level, Topology, pairs

WEIGHTS = {Level.PIX: 1.0, Level.PXB: 1.0, Level.PHB: 0.5, Level.NODE: 0.25, Level.SYS: 0.0}
MOST_EXACT = 8
_LEAST_GAIN = 1e-9


@dataclass(frozen=True)
class Mapping:
    """``order[i]`` is the GPU of stage i; costs are those of ``cost``.

    is_exact: whether no order is cheaper, rather than none that swaps two GPUs.
    """

    order: tuple[int, ...]
    cost: float
    identity_cost: float
    is_exact: bool

    @property
    def gains(self) -> bool:
        """Whether the order is cheaper than the GPUs' own."""
        return self.cost < self.identity_cost - _LEAST_GAIN


def cost(topology: Topology, order: Sequence[int]) -> float:
    """Return how much stages of ``order`` get into each other's way on shared links.

    Two stages next to each other load their model chunks at about the same time; those far apart
    do not. Each pair counts what it shares (WEIGHTS) over its distance in the ring of stages:
    activations come back to the first stage with each model chunk.
    """
    number = len(order)
    return sum(
        WEIGHTS[topology.level(order[i], order[j])] / min(j - i, number - (j - i))
        for i, j in pairs(number)
    )


def best_order(topology: Topology) -> Mapping:
    """Return the cheapest order, of equals the first; exact up to MOST_EXACT GPUs.

    A ring may be turned, so GPU 0 takes stage 0.
    """
    identity = tuple(range(topology.size))
    own = cost(topology, identity)
    is_exact = topology.size <= MOST_EXACT
    if is_exact:
        orders = ((0, *rest) for rest in itertools.permutations(identity[1:]))
        order = min(orders, key=lambda order: round(cost(topology, order), 9))
    else:
        order = min(
            (_swapped(topology, start) for start in (identity, _dealt(topology))),
            key=lambda order: round(cost(topology, order), 9),
        )
    found = Mapping(order, cost(topology, order), own, is_exact)
    return found if found.gains else Mapping(identity, own, own, is_exact)


def _dealt(topology: Topology) -> tuple[int, ...]:
    """Take one GPU of each host bridge in turn."""
    turns = itertools.zip_longest(*topology.groups(Level.PHB))
    return tuple(gpu for turn in turns for gpu in turn if gpu is not None)


def _swapped(topology: Topology, order: tuple[int, ...]) -> tuple[int, ...]:
    """Swap two stages as long as that makes the order cheaper, the best swap first."""
    while True:
        swaps = [_with_swap(order, i, j) for i, j in pairs(len(order))]
        cheapest = min(swaps, key=lambda order: cost(topology, order))
        if cost(topology, cheapest) > cost(topology, order) - _LEAST_GAIN:
            return order
        order = cheapest


def _with_swap(order: tuple[int, ...], i: int, j: int) -> tuple[int, ...]:
    swapped = list(order)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    return tuple(swapped)
