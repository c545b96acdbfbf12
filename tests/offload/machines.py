"""Descriptions of machines, as the tools print them."""


def matrix(*groups: str, cards: dict[str, str] | None = None, colour: bool = False) -> str:
    """Return a matrix whose rows are given as words; cards: the cells of a network card's row."""
    rows = [group.split() for group in groups]
    names = [f"GPU{i}" for i in range(len(rows))] + list(cards or ())
    header = "\t" + "\t".join(names) + "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID"
    if colour:
        header = "\t" + header.strip().replace("GPU", "\x1b[4mGPU", 1) + "\x1b[0m"
    lines = [header]
    for number, cells in enumerate(rows):
        lines.append(f"GPU{number}\t" + "\t".join(cells))
    for name, cells in (cards or {}).items():
        lines.append(f"{name}\t" + "\t".join(cells.split()))
    return "\n".join(lines) + LEGEND


LEGEND = """

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""


def grouped(*sizes: int, near: str = "PHB", far: str = "SYS") -> str:
    """Return the matrix of GPUs in groups that share ``near`` and, to each other, ``far``."""
    where = [group for group, size in enumerate(sizes) for _ in range(size)]
    rows = [
        " ".join(
            ["X" if i == j else near if here == there else far for j, there in enumerate(where)]
            + ["0-15", str(here), "N/A"]
        )
        for i, here in enumerate(where)
    ]
    return matrix(*rows)


PAIRS_OF_TWO_SOCKETS = matrix(
    *[
        " ".join(
            "X" if i == j else "PIX" if i // 2 == j // 2 else "NODE" if i // 4 == j // 4 else "SYS"
            for j in range(8)
        )
        + f" {48 * (i // 4)}-{48 * (i // 4) + 47} {i // 4} N/A"
        for i in range(8)
    ],
    colour=True,
)

UNEVEN_FIVE = matrix(
    "X SYS SYS SYS SYS 8-15,24-31 1 N/A",
    "SYS X PHB NODE NODE 0-7,16-23 0 N/A",
    "SYS PHB X NODE NODE 0-7,16-23 0 N/A",
    "SYS NODE NODE X PHB 0-7,16-23 0 N/A",
    "SYS NODE NODE PHB X 0-7,16-23 0 N/A",
)

NVLINK_WITH_CARDS = matrix(
    "X NV12 NV12 NV12 PXB SYS 0-31 0 N/A",
    "NV12 X NV12 NV12 PXB SYS 0-31 0 N/A",
    "NV12 NV12 X NV12 SYS PXB 32-63 1 N/A",
    "NV12 NV12 NV12 X SYS PXB 32-63 1 N/A",
    cards={"NIC0": "PXB PXB SYS SYS X SYS", "NIC1": "SYS SYS PXB PXB SYS X"},
)

NVLINK_ALONE = matrix(
    "X NV18 NV18 NV18 0-31 0 N/A",
    "NV18 X NV18 NV18 0-31 0 N/A",
    "NV18 NV18 X NV18 32-63 1 N/A",
    "NV18 NV18 NV18 X 32-63 1 N/A",
)

# two root complexes; on each a switch with two GPUs, whose second function is a sound device
TREE = r"""-+-[0000:00]-+-00.0
 |           +-01.0
 |           \-01.1-[01]----00.0
 +-[0000:20]-+-00.0
 |           \-03.1-[21-24]----00.0-[22-24]--+-02.0-[23]--+-00.0
 |                                           |            \-00.1
 |                                           \-04.0-[24]--+-00.0
 |                                                        \-00.1
 \-[0000:60]-+-00.0
             \-03.1-[61-64]----00.0-[62-64]--+-02.0-[63]----00.0
                                             \-04.0-[64]----00.0
"""

TREE_WITH_NAMES = r"""-+-[0000:00]-+-00.0  Advanced Micro Devices, Inc. [AMD] Root Complex
 |           \-01.1-[01]----00.0  Samsung Electronics Co Ltd NVMe SSD Controller PM9A1
 +-[0000:20]-+-00.0  Advanced Micro Devices, Inc. [AMD] Root Complex
 |           +-01.1-[21]--+-00.0  NVIDIA Corporation AD102 [GeForce RTX 4090]
 |           |            \-00.1  NVIDIA Corporation AD102 High Definition Audio Controller
 |           \-03.1-[22]--+-00.0  NVIDIA Corporation AD102 [GeForce RTX 4090]
 |                        \-00.1  NVIDIA Corporation AD102 High Definition Audio Controller
 \-[0000:60]-+-01.1-[61]----00.0  NVIDIA Corporation AD102 [GeForce RTX 4090]
             \-03.1-[62]----00.0  NVIDIA Corporation AD102 [GeForce RTX 4090]
"""
