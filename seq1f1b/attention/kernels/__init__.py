"""Attention kernels that know their log-sum-exp, one file each, and which to take."""

from torch import Tensor

from seq1f1b.attention.kernels.cpu_flash import CpuFlash
from seq1f1b.attention.kernels.interface import Kernel, PackedKernel
from seq1f1b.attention.kernels.reference import Reference
from seq1f1b.attention.kernels.torch_flash import TorchFlash

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel for kernel in (TorchFlash(), CpuFlash(), Reference())
}


def choose_kernel(query: Tensor, key: Tensor, value: Tensor, name: str | None = None) -> Kernel:
    """Return the kernel called ``name``, or the first that takes these tensors.

    Raises ValueError when the named kernel does not exist or cannot take them.
    """
    if name is None:
        return next(k for k in KERNELS.values() if k.supports(query, key, value))
    if name not in KERNELS:
        raise ValueError(f"no attention kernel {name!r}; there are {', '.join(KERNELS)}")
    if not KERNELS[name].supports(query, key, value):
        raise ValueError(
            f"attention kernel {name!r} cannot take {query.dtype} on {query.device.type} with "
            f"head sizes {key.shape[-1]} and {value.shape[-1]}"
        )
    return KERNELS[name]


__all__ = ["KERNELS", "Kernel", "PackedKernel", "choose_kernel"]
