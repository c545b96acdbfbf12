"""How the GPUs of a machine hang together: what two of them share on the way to host memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from seq1f1b.errors import Seq1F1BError


class TopologyError(Seq1F1BError, ValueError):
    """A description of a machine that cannot be read; the message names the line."""


class Level(StrEnum):
    """What two GPUs share, in the words of ``nvidia-smi topo -m``, from the nearest.

    PIX: a switch or a root port. PXB: several switches below one root port. PHB: a host bridge
    (root complex). NODE: a NUMA node. SYS: nothing but the machine.
    """

    PIX = "PIX"
    PXB = "PXB"
    PHB = "PHB"
    NODE = "NODE"
    SYS = "SYS"


FROM_NEAR = tuple(Level)


@dataclass(frozen=True)
class Topology:
    """GPUs in the order of their PCI addresses, which is that of ``nvidia-smi``.

    names: what each is called. levels: for each pair (i, j) with i < j what they share. notes: what
    the description did not say and what was taken instead.
    """

    names: tuple[str, ...]
    levels: Mapping[tuple[int, int], Level]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise TopologyError("it lists no GPU")

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return len(self.names)

    def level(self, one: int, other: int) -> Level:
        """Return what two different GPUs share."""
        return self.levels[min(one, other), max(one, other)]

    def groups(self, level: Level, among: Sequence[int] | None = None) -> list[list[int]]:
        """Return the GPUs that share ``level`` or something nearer, group by group."""
        left = list(range(self.size) if among is None else among)
        groups = []
        while left:
            group = [left.pop(0)]
            for member in group:  # grows while it is walked
                near = [g for g in left if self._is_within(member, g, level)]
                group += near
                left = [g for g in left if g not in near]
            groups.append(sorted(group))
        return groups

    def _is_within(self, one: int, other: int, level: Level) -> bool:
        return FROM_NEAR.index(self.level(one, other)) <= FROM_NEAR.index(level)


def pairs(number: int) -> Iterator[tuple[int, int]]:
    """Yield all (i, j) with i < j below ``number``."""
    return ((i, j) for i in range(number) for j in range(i + 1, number))
