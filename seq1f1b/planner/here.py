"""Which description fits the device that this process runs on."""

import os

from seq1f1b.planner.errors import DataFileError
from seq1f1b.planner.gpu import THIS_MACHINE, Gpu, gpu

_NAMES = (
    (("A100", "PCIE"), "a100-80g-pcie"),
    (("A100", "40GB"), "a100-40g"),
    (("A100",), "a100-80g"),
    (("H100", "PCIE"), "h100-pcie"),
    (("H100",), "h100"),
    (("H200",), "h200"),
    (("B200",), "b200"),
    (("L40S",), "l40s"),
    (("L20",), "l20"),
    (("4090",), "rtx-4090"),
)


def device_here(device_name: str | None) -> Gpu | None:
    """Return the description of a device by the name that CUDA gives it; None if there is none.

    ``device_name`` is None on a host, which only a calibration describes, and only where all ranks
    are on one machine: another one may have another, and ranks must agree.
    """
    if device_name is not None:
        words = device_name.upper().replace("_", " ")
        for parts, name in _NAMES:
            if all(part in words for part in parts):
                return gpu(name)
        return None
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world > local and "LOCAL_WORLD_SIZE" in os.environ:
        return None
    try:
        return gpu(THIS_MACHINE)
    except DataFileError:
        return None
