"""Which tokens of a micro-batch a rank of context parallelism has, cut into sub-sequences or not.

Megatron cuts a sequence into 2 c pieces for c ranks and gives rank r pieces r and 2 c - 1 - r. Each
sub-sequence is dealt out in the same way, so a rank's tokens are others than with one split.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from seq1f1b.sequence import SubSequence


class Shards:
    """Exchanges values of tokens between the two ways of dealing them out; all ranks must call."""

    def __init__(self, parts: Sequence[SubSequence], group: Any) -> None:
        self._parts = parts
        self._group = group
        self._size = group.size()

    @property
    def own_lengths(self) -> tuple[int, ...]:
        """Number of this rank's tokens in each sub-sequence."""
        return tuple(part.length // self._size for part in self._parts)

    def as_one_split(self, tensor: Tensor, dim: int) -> Tensor:
        """Exchange this rank's tokens of all sub-sequences for those it has with one split."""
        return self._exchange(tensor, dim, self._of_sub_sequences, self._of_one_split)

    def as_sub_sequences(self, tensor: Tensor, dim: int) -> Tensor:
        """Undo ``as_one_split``."""
        return self._exchange(tensor, dim, self._of_one_split, self._of_sub_sequences)

    def _exchange(
        self, tensor: Tensor, dim: int, held: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> Tensor:
        if self._size == 1:
            return tensor
        tensor = tensor.contiguous()
        from_ranks = [torch.empty_like(tensor) for _ in range(self._size)]
        torch.distributed.all_gather(from_ranks, tensor, group=self._group)
        places = torch.cat(list(held)).argsort()
        whole = torch.cat(from_ranks, dim).index_select(dim, places.to(tensor.device))
        return whole.index_select(dim, wanted[self._group.rank()].to(tensor.device))

    @cached_property
    def _of_one_split(self) -> list[Tensor]:
        """Positions of each rank's tokens with one split."""
        return dealt(torch.arange(self._parts[-1].total), self._size)

    @cached_property
    def _of_sub_sequences(self) -> list[Tensor]:
        """Positions of each rank's tokens of all sub-sequences."""
        of_parts = [dealt(torch.arange(part.start, part.stop), self._size) for part in self._parts]
        return [torch.cat(of_rank) for of_rank in zip(*of_parts, strict=True)]


def dealt(positions: Tensor, size: int) -> list[Tensor]:
    """Return which of ``positions`` each of ``size`` ranks of context parallelism has."""
    pieces = positions.chunk(2 * size)
    return [torch.cat((pieces[rank], pieces[-1 - rank])) for rank in range(size)]
