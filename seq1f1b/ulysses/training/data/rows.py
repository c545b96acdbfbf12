"""Rows of a data set as tensors, and the order in which a run sees them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from seq1f1b.ulysses.labels import IGNORED
from seq1f1b.ulysses.training.data.packing import Row
from seq1f1b.ulysses.training.data.store import Store


@dataclass(frozen=True)
class RowBatch:
    """Whole rows, ``[b, s]`` each, with labels as Hugging Face has them.

    attention_mask: None without padding. num_tokens: without padding. num_targets: labels that a
    token before them predicts.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    num_tokens: int
    num_targets: int

    def to(self, device: str) -> "RowBatch":
        """Return the batch on another device."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
        )


@dataclass(frozen=True)
class PackedRows:
    """Documents and how they share rows."""

    store: Store
    rows: list[Row]

    def batch(self, indices: Sequence[int], least: int = 1) -> RowBatch:
        """Return some rows, padded on the right to the longest of them or to ``least`` tokens."""
        length = max(least, *(sum(piece.length for piece in self.rows[i]) for i in indices))
        ids = torch.zeros(len(indices), length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        num_targets = 0
        for row, index in enumerate(indices):
            begin = 0
            for piece in self.rows[index]:
                first = int(self.store.bounds[piece.document])
                source = slice(first + piece.start, first + piece.stop)
                place = slice(begin, begin + piece.length)
                tokens = torch.from_numpy(np.asarray(self.store.tokens[source], dtype=np.int64))
                learned = torch.from_numpy(np.array(self.store.learned[source]))
                learned[0] = False  # no token of this document comes before it
                ids[row, place] = tokens
                labels[row, place] = tokens.masked_fill(~learned, IGNORED)
                positions[row, place] = torch.arange(piece.length)
                mask[row, place] = 1
                num_targets += int(learned.sum())
                begin = place.stop
        num_tokens = int(mask.sum())
        padding = None if num_tokens == mask.numel() else mask
        return RowBatch(ids, labels, positions, padding, num_tokens, num_targets)


@dataclass(frozen=True)
class Order:
    """The rows of each step: shuffled anew in every epoch, the same whatever the ranks.

    A step takes the next ``global_batch_size`` rows, through the end of an epoch if need be.
    """

    num_rows: int
    global_batch_size: int
    seed: int

    def step(self, number: int) -> list[int]:
        """Return the rows of step ``number``, counted from 0."""
        first = number * self.global_batch_size
        return [self._row(place) for place in range(first, first + self.global_batch_size)]

    def _row(self, place: int) -> int:
        epoch, inside = divmod(place, self.num_rows)
        return _shuffled(self.num_rows, self.seed + epoch)[inside]


_orders: dict[tuple[int, int], list[int]] = {}


def _shuffled(num_rows: int, seed: int) -> list[int]:
    key = num_rows, seed
    if key not in _orders:
        while len(_orders) > 3:
            _orders.pop(next(iter(_orders)))
        generator = torch.Generator().manual_seed(seed)
        _orders[key] = torch.randperm(num_rows, generator=generator).tolist()
    return _orders[key]
