"""Samples dealt to data-parallel ranks: all ranks of a sequence-parallel group get the same."""

import math
import random
from collections.abc import Iterator, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from seq1f1b.ulysses.mesh import sequence_parallel


class SequenceParallelSampler(Sampler[int]):
    """``torch.utils.data.DistributedSampler`` over groups instead of ranks, resumable in mid-epoch.

    dataset: anything with a length. seed: all ranks draw one together if it is None.
    round_up: repeat first samples until every group gets as many; ``drop_last`` cuts the rest off
    instead. With neither, groups can get numbers of samples that differ by one.

    ``state_dict`` counts samples of all groups, so it can be loaded with another number of groups.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
        *,
        drop_last: bool = False,
    ) -> None:
        parallel = sequence_parallel()
        self.rank, self.world_size = parallel.data_rank, parallel.data_size
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = _agree_on_seed() if seed is None else seed
        self.round_up = round_up
        self.drop_last = drop_last
        self.epoch = 0
        self._start = 0
        self._consumed = 0

    def __len__(self) -> int:
        """Samples that this group gets in a whole epoch."""
        num, size = len(self.dataset), self.world_size
        if self.drop_last:
            return num // size
        return math.ceil((num if self.round_up else num - self.rank) / size)

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        self._consumed, self._start = self._start, 0
        for index in order[self._consumed + self.rank :: self.world_size]:
            self._consumed += self.world_size
            yield index

    def _order(self) -> list[int]:
        """Return one epoch's samples of all groups in turn."""
        num = len(self.dataset)
        order = list(range(num))
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
            order = torch.randperm(num, generator=generator).tolist()
        rest = num % self.world_size
        if rest and self.drop_last:
            return order[: num - rest]
        if rest and self.round_up:
            missing = self.world_size - rest
            order += (order * math.ceil(missing / num))[:missing]
        return order

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew for ``epoch``, counted from 0, and begin at its first sample."""
        if epoch != self.epoch:
            self.epoch, self._start, self._consumed = epoch, 0, 0

    def state_dict(self, num_consumed: int | None = None) -> dict[str, Any]:
        """Return what ``load_state_dict`` needs to continue behind the last sample.

        num_consumed: samples of this epoch that all groups together have been trained on. Without
        it, what was drawn from here; a DataLoader with workers draws ahead of the training.
        """
        consumed = self._consumed if num_consumed is None else num_consumed
        return {"epoch": self.epoch, "seed": self.seed, "num_consumed": consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin behind what ``state`` had consumed."""
        self.epoch, self.seed = state["epoch"], state["seed"]
        self._start = self._consumed = state["num_consumed"]


def _agree_on_seed() -> int:
    seed = [random.SystemRandom().randrange(2**31)]
    if dist.is_initialized():
        dist.broadcast_object_list(seed, src=0)
    return seed[0]
