"""Attention kernels that know their log-sum-exp, one file each, and which to take."""

from torch import Tensor

from seq1f1b.attention.kernels.cpu_flash import CpuFlash
from seq1f1b.attention.kernels.cuda import CudaKernel
from seq1f1b.attention.kernels.cudnn import Cudnn
from seq1f1b.attention.kernels.flash_attn_2 import FlashAttn2
from seq1f1b.attention.kernels.flash_attn_3 import FlashAttn3
from seq1f1b.attention.kernels.interface import (
    Attended,
    Gradients,
    Inputs,
    Kernel,
    PackedKernel,
)
from seq1f1b.attention.kernels.padded import Padded
from seq1f1b.attention.kernels.reference import Reference
from seq1f1b.attention.kernels.torch_flash import TorchFlash
from seq1f1b.attention.kernels.transformer_engine import TransformerEngine

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttn3(),
        FlashAttn2(),
        TorchFlash(),
        TransformerEngine(),
        Cudnn(),
        CpuFlash(),
        Reference(),
    )
}
"""In the order in which they are tried."""

_PADDED = {name: Padded(kernel) for name, kernel in KERNELS.items()}


def choose_kernel(query: Tensor, key: Tensor, value: Tensor, name: str | None = None) -> Kernel:
    """Return the kernel called ``name``, or the first that takes these tensors.

    A kernel that wants values as wide as keys gets them padded. Raises ValueError when the named
    kernel does not exist or cannot take the tensors.
    """
    if name is not None and name not in KERNELS:
        raise ValueError(f"no attention kernel {name!r}; there are {', '.join(KERNELS)}")
    for candidate in KERNELS if name is None else (name,):
        for kernel in (KERNELS[candidate], _PADDED[candidate]):
            if kernel.supports(query, key, value):
                return kernel
    raise ValueError(
        f"attention kernel {name!r} cannot take {query.dtype} on {query.device.type} with "
        f"head sizes {key.shape[-1]} and {value.shape[-1]}, or is not installed here"
    )


def is_available(name: str) -> bool:
    """Whether the kernel called ``name`` finds the package and the device that it needs."""
    kernel = KERNELS[name]
    return kernel.available() if isinstance(kernel, CudaKernel) else True


__all__ = [
    "KERNELS",
    "Attended",
    "Gradients",
    "Inputs",
    "Kernel",
    "PackedKernel",
    "choose_kernel",
    "is_available",
]
