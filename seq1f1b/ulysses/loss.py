"""The mean loss of a group from the mean losses of its shards, with the right gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seq1f1b.ulysses.mesh import sequence_parallel


def reduce_sequence_parallel_loss(
    mean_loss: Tensor, loss_scale: Tensor | int, sp_group: ProcessGroup | None = None
) -> Tensor:
    """Return the mean over the group's ``sum(n_r)`` targets, the same on every rank.

    mean_loss: of this rank's ``loss_scale`` = n_r targets; a shard without targets may hold NaN.
    Its gradient is ``size * n_r / sum(n_r)``, so that gradients *averaged* over all ranks, as DDP,
    FSDP and ZeRO average them, are those of one process. A group without any target has loss 0.
    """
    group = sp_group if sp_group is not None else sequence_parallel().group
    count = torch.as_tensor(loss_scale, device=mean_loss.device, dtype=torch.float64)
    count = count.detach().as_subclass(Tensor)
    return _Reduce.apply(torch.where(count > 0, mean_loss, 0.0), count, group)


class _Reduce(torch.autograd.Function):
    """One sum over the group forward, none backward."""

    @staticmethod
    def forward(ctx: Any, mean_loss: Tensor, count: Tensor, group: ProcessGroup | None) -> Tensor:
        totals = torch.stack([mean_loss.double() * count, count])
        size = 1
        if group is not None:
            dist.all_reduce(totals, group=group)
            size = dist.get_world_size(group)
        total = totals[1].clamp(min=1)
        ctx.weight = (size * count / total).to(mean_loss.dtype)
        return (totals[0] / total).to(mean_loss.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output * ctx.weight, None, None
