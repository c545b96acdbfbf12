"""Exchange all heads of some tokens for all tokens of some heads, and back.

A rank of c then has a whole sub-sequence of its share of the heads, and carries keys and values of
those heads only (DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Dealing = Callable[[int], tuple[int, ...]]
"""From the number of ranks to the pieces of a sequence that they hold, those of rank 0 first."""


def head_and_tail(size: int) -> tuple[int, ...]:
    """Cut a sequence into 2 c pieces, of which rank r holds r and 2 c - 1 - r, as Megatron does."""
    return tuple(piece for rank in range(size) for piece in (rank, 2 * size - 1 - rank))


def to_heads(group: Any, tensor: Tensor, dealing: Dealing) -> Tensor:
    """Give up other ranks' heads for the tokens of all ranks, in their order in the sequence.

    ``tensor`` is ``[n / c, b, heads, dim]`` and the result ``[n, b, heads / c, dim]``, for a
    ``group`` of c ranks of which each calls. Raises ValueError if c does not divide the heads.
    """
    size = group.size()
    length, batch, heads, dim = tensor.shape
    if heads % size:
        raise ValueError(
            f"context parallelism cannot deal {heads} heads of this tensor-parallel rank out to "
            f"{size} ranks: lower --context-parallel-size or --tensor-model-parallel-size"
        )
    shares = tensor.reshape(length, batch, size, heads // size, dim).permute(2, 0, 1, 3, 4)
    received = _AllToAll.apply(shares, group)
    order = dealing(size)
    pieces = received.reshape(len(order), -1, batch, heads // size, dim).unbind()
    return torch.cat([pieces[place] for place in sorted(range(len(order)), key=order.__getitem__)])


def to_tokens(group: Any, tensor: Tensor, dealing: Dealing) -> Tensor:
    """Undo ``to_heads``: from ``[n, b, heads / c, dim]`` to ``[n / c, b, heads, dim]``."""
    size = group.size()
    length, batch, heads, dim = tensor.shape
    order = dealing(size)
    pieces = tensor.reshape(len(order), -1, batch, heads, dim).unbind()
    dealt = torch.cat([pieces[piece] for piece in order])
    shares = _AllToAll.apply(dealt.view(size, length // size, batch, heads, dim), group)
    return shares.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Entry i of the first dimension goes to rank i, whose entry takes its place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllToAll.apply(grad, ctx.group), None
