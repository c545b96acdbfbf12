"""What kernels for CUDA have in common: half precision, and a package or a GPU that is there."""

from abc import ABC, abstractmethod
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from seq1f1b.attention.kernels.limits import Limited

HALF = (torch.float16, torch.bfloat16)
AMPERE = 8


class CudaKernel(Limited, ABC):
    """Subclasses say whether they are there."""

    @abstractmethod
    def available(self) -> bool:
        """Whether the package and the device that it needs are there."""

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        return super().supports(query, key, value) and self.available()


@lru_cache(maxsize=1)
def generation() -> int:
    """Return the first number of the GPU's compute capability; 0 without a GPU."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


@lru_cache(maxsize=8)
def is_installed(package: str, oldest: tuple[int, int]) -> bool:
    """Whether ``package`` is there, in version ``oldest`` or a later one."""
    try:
        return tuple(map(int, version(package).split(".")[:2])) >= oldest
    except (PackageNotFoundError, ValueError):
        return False
