"""How the C library manages memory under torch on a CPU: part of ``cpu_device``."""

import ctypes

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_NEVER = 2**31 - 1
_TOP_PAD_BYTES = 2**26


def keep_freed_memory() -> None:
    """Let the C library keep what tensors free, as torch's allocator for CUDA does.

    Otherwise large activations go back to the kernel and are faulted in again, page by page, in
    every forward and backward.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        return
    for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        libc.mallopt(parameter, _NEVER)
    libc.mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
