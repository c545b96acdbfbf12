"""What kernels for CUDA have in common: half precision, and heads of certain sizes."""

from abc import ABC, abstractmethod
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8
AMPERE = 8


class CudaKernel(ABC):
    """Subclasses say whether they are there, and which heads they take if not these."""

    @abstractmethod
    def available(self) -> bool:
        """Whether the package and the device that it needs are there."""

    def takes_heads(self, key_size: int, value_size: int) -> bool:
        """Whether heads may have these sizes."""
        return key_size == value_size <= _LARGEST_HEAD and key_size % _HEAD_MULTIPLE == 0

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        return (
            query.device.type == "cuda"
            and query.dtype in _HALF
            and self.takes_heads(key.shape[-1], value.shape[-1])
            and self.available()
        )


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
