"""Reading ``nvidia-smi topo -m``, whose matrix says for each pair of devices what they share."""

import re

from seq1f1b.offload.topology import FROM_NEAR, Level, Topology, TopologyError, pairs

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_DEVICE = re.compile(r"(GPU|NIC|mlx\w*_|hfi\w*_)\d+")
_GPU = re.compile(r"GPU\d+")
_LINK = re.compile(r"NV\d+")
_SELF = "X"
_ALIASES = {"SOC": Level.SYS}  # what drivers before 384 write
_AFFINITIES = 2  # columns behind those of the devices that say where a GPU is: CPU and NUMA


def looks_like_matrix(text: str) -> bool:
    """Whether ``text`` has a row of such a matrix."""
    return any(_GPU.match(line.strip()) for line in _COLOURS.sub("", text).splitlines())


def parse_matrix(text: str) -> Topology:
    """Read what ``nvidia-smi topo -m`` prints, its colours and its legend included.

    A cell NV# says that two GPUs have a link of their own, and hides what they share towards the
    host: the network cards' cells tell it, or else the NUMA nodes. Raises TopologyError, with the
    number of the line, for a matrix that is incomplete or contradicts itself.
    """
    columns: list[str] = []
    rows: dict[str, list[str]] = {}
    affinities: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(_COLOURS.sub("", text).splitlines(), 1):
        words = line.split()
        if not words or not _DEVICE.fullmatch(words[0]):
            continue
        name = words[0]
        if _SELF not in words[1:] and (not columns or "CPU" in words):
            header = [word for word in words if _DEVICE.fullmatch(word)]
            if columns and header != columns:
                raise TopologyError(f"line {number}: a second header, other than the first")
            columns = header
            continue
        if not columns:
            raise TopologyError(f"line {number}: {name} comes before the header of columns")
        if name not in columns:
            raise TopologyError(f"line {number}: {name} is not among the columns")
        if name in rows:
            raise TopologyError(f"line {number}: a second row of {name}")
        cells = words[1 : 1 + len(columns)]
        if len(cells) < len(columns):
            raise TopologyError(
                f"line {number}: {name} has {len(cells)} cells for {len(columns)} columns"
            )
        for column, cell in zip(columns, cells, strict=True):
            if (cell == _SELF) != (column == name) or not _is_cell(cell):
                raise TopologyError(f"line {number}: {name} has {cell!r} under {column}")
        rows[name], lines[name] = cells, number
        affinities[name] = words[1 + len(columns) :][:_AFFINITIES]
    names = [name for name in columns if _GPU.fullmatch(name)]
    if missing := [name for name in names if name not in rows]:
        raise TopologyError(f"there is no row of {', '.join(missing)}")
    return _Matrix(columns, rows, affinities, lines).topology(names)


def _is_cell(cell: str) -> bool:
    return cell in Level.__members__ or cell in _ALIASES or cell == _SELF or bool(_LINK.match(cell))


class _Matrix:
    def __init__(
        self,
        columns: list[str],
        rows: dict[str, list[str]],
        affinities: dict[str, list[str]],
        lines: dict[str, int],
    ) -> None:
        self.columns, self.rows, self.affinities, self.lines = columns, rows, affinities, lines

    def topology(self, names: list[str]) -> Topology:
        levels, unknown = {}, False
        for i, j in pairs(len(names)):
            one, other = names[i], names[j]
            cell, back = self.cell(one, other), self.cell(other, one)
            if cell != back:
                raise TopologyError(
                    f"line {self.lines[other]}: {other} has {back} under {one}, which has {cell} "
                    f"under {other}"
                )
            if _LINK.match(cell):
                unknown = unknown or not self.by_others(one, other)
                levels[i, j] = self.by_others(one, other) or self.by_affinity(one, other)
            else:
                levels[i, j] = _level(cell)
        notes = ["GPUs with NVLink: what they share towards the host is told by their NUMA nodes"]
        return Topology(tuple(names), levels, tuple(notes if unknown else ()))

    def cell(self, row: str, column: str) -> str:
        return self.rows[row][self.columns.index(column)]

    def by_others(self, one: str, other: str) -> Level | None:
        """Return the nearest place that both share with a network card; None without cards."""
        shared = [
            max(self.cell(one, card), self.cell(other, card), key=lambda c: _far(_level(c)))
            for card in self.columns
            if not _GPU.fullmatch(card)
        ]
        return min(map(_level, shared), key=_far) if shared else None

    def by_affinity(self, one: str, other: str) -> Level:
        same = self.affinities[one] == self.affinities[other]
        return Level.NODE if same else Level.SYS


def _level(cell: str) -> Level:
    return _ALIASES[cell] if cell in _ALIASES else Level(cell)


def _far(level: Level) -> int:
    return FROM_NEAR.index(level)
