"""Times transfers between the ranks of this machine."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from seq1f1b.planner.calibrate.kernels import Bench

_SIZES = (1 << 16, 1 << 19, 1 << 22, 1 << 25)


def collectives(bench: Bench) -> Iterator[tuple[str, int, float]]:
    """Yield kind, bytes of the whole tensor and seconds, of those that the backend has."""
    ranks = dist.get_world_size()
    for size in _SIZES:
        whole = bench.random(size // bench.random(1).element_size() // ranks * ranks)
        share = torch.empty(whole.numel() // ranks, device=whole.device, dtype=whole.dtype)
        other = torch.empty_like(whole)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, share),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, share, whole),
            "all_to_all": partial(dist.all_to_all_single, other, whole),
        }
        for kind, call in calls.items():
            try:
                yield kind, whole.nbytes, bench.seconds(call, waits=True)
            except RuntimeError:
                continue  # not every backend has every collective


def message(bench: Bench) -> tuple[float, float]:
    """Return the latency of a message between two ranks in seconds, and bytes per second."""
    small, large = bench.random(1), bench.random(1 << 22)
    quick, long = (bench.seconds(partial(_ping, one), waits=True) / 2 for one in (small, large))
    return quick, large.nbytes / max(long - quick, 1e-9)


def _ping(tensor: Tensor) -> None:
    """Send a tensor from rank 0 to rank 1 and back."""
    rank = dist.get_rank()
    if rank == 0:
        dist.send(tensor, 1)
        dist.recv(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)
        dist.send(tensor, 0)
