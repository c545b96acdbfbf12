"""Devices and the measured curves of their kernels: description files in data/gpus and curves."""

import os
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from seq1f1b.planner.errors import DataFileError
from seq1f1b.planner.files import Described, Figure, available, load

THIS_MACHINE = "this-machine"


class Curves(Described):
    """Measured points of one device's kernels.

    gemm: rows (tokens), columns, inner size, TFLOP/s. attention: own tokens, tokens before them,
    heads, heads of keys, size of a head, TFLOP/s of the causal forward; attention_backward is the
    backward's rate over the forward's, unless backward_points has points of the same form.
    prefix_scaling: by which length the rate of attention to a prefix goes where no point has one.
    tile: rows that matrix products compute together.
    collectives: bytes of the whole tensor, ranks, milliseconds.
    """

    kind: Literal["measured", "assumed"]
    gemm: tuple[tuple[int, int, int, float], ...]
    attention: tuple[tuple[int, int, int, int, int, float], ...]
    backward_points: tuple[tuple[int, int, int, int, int, float], ...] = ()
    attention_backward: Figure
    prefix_scaling: Literal["own", "total", "geometric"]
    tile: int = 128
    collectives: dict[str, tuple[tuple[int, int, float], ...]] = Field(default_factory=dict)
    elementwise: tuple[tuple[int, float], ...] = ()


_BACKWARD_TRAFFIC = Figure(
    value=1.6,
    kind="assumed",
    source="bytes that elementwise kernels move in a backward, over those of its forward",
)


_HOST_MEMORY = Figure(
    value=300,
    kind="assumed",
    source="memory bandwidth that all cores of a server reach together",
)


class Gpu(Described):
    """A device and its node.

    usable_gib: what the allocator can reserve. Bandwidths in GB/s (10^9 bytes), one way. curves:
    name or path of a file of curves; their rates times curve_scale.
    """

    bf16_tflops: Figure
    memory_gib: Figure
    usable_gib: Figure
    memory_gb_s: Figure
    memory_efficiency: Figure
    link: Literal["nvlink", "pcie", "host"]
    link_gb_s: Figure
    network_gb_s: Figure
    network_efficiency: Figure
    latency_us: Figure
    host_us: Figure
    action_us: Figure
    backward_traffic: Figure = _BACKWARD_TRAFFIC
    host_memory_gb_s: Figure = _HOST_MEMORY
    gpus_per_node: int
    curves: str | Curves
    curve_scale: float = 1.0
    runtime: str = "current"

    @property
    def kernel_curves(self) -> Curves:
        """The curves themselves."""
        if isinstance(self.curves, Curves):
            return self.curves
        return _curves(self.curves)


@cache
def gpu(name: str) -> Gpu:
    """Load a device by name or path; raises DataFileError for one that there is not.

    ``this-machine`` is what ``seq1f1b calibrate`` wrote.
    """
    if name == THIS_MACHINE:
        path = calibrated_file()
        if not path.is_file():
            raise DataFileError(
                f"{THIS_MACHINE} is not described yet ({path} is missing): run seq1f1b calibrate"
            )
        return load(Gpu, "gpus", str(path))
    return load(Gpu, "gpus", name)


@cache
def _curves(name: str) -> Curves:
    return load(Curves, "curves", name)


def gpus() -> list[str]:
    """Return the names of all devices that the package describes."""
    return available("gpus")


def calibrated_file() -> Path:
    """Return where ``seq1f1b calibrate`` writes the description of this machine."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "seq1f1b" / f"{THIS_MACHINE}.yaml"
