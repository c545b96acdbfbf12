"""What only the first stage can know before a step, and every stage has to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.adaptor.batch import Replay


def from_first_stage(
    groups: Any,
    replay: Replay | None,
    num_micro_batches: int,
    derive: Callable[[list[Any]], Tensor],
    like: Tensor,
) -> Tensor:
    """Return what ``derive`` makes of the step's micro-batches, on the CPU; all ranks must call.

    ``replay`` is where this rank reads micro-batches; that of the first stage is read ahead, by the
    first rank of its tensor-parallel group, the only one that has data. ``derive`` gets [None]
    where there is none. ``groups`` are Megatron's; ``like`` has the result's shape and type.
    """
    value = like
    if groups.tp.rank() == 0:
        if groups.pp.rank() == 0:
            value = derive([None] if replay is None else replay.read_ahead(num_micro_batches))
        value = _broadcast(value, groups.pp)
    return _broadcast(value, groups.tp).cpu()


def _broadcast(value: Tensor, group: Any) -> Tensor:
    """Return what the first rank of ``group`` has; all of them must call, with the same shape."""
    if group.size() == 1:
        return value
    value = value.to(torch.cuda.current_device())
    torch.distributed.broadcast(value, group=group, group_src=0)
    return value
