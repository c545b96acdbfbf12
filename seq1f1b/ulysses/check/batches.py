"""Batches that a check tries: plain rows, packed documents, padding on either side."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seq1f1b.ulysses.labels import IGNORED

LAYOUTS = ("plain", "packed", "padded", "padded-left")


@dataclass(frozen=True)
class Batch:
    """What a user has: labels as Hugging Face has them, and no attention mask without padding.

    All are ``[b, s]``. documents: for each row, where its documents begin and end; padding lies
    outside of them.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    documents: tuple[tuple[tuple[int, int], ...], ...]

    def to(self, device: str) -> "Batch":
        """Return the batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
        )

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents."""
        return any(len(row) > 1 for row in self.documents)


def make_batch(
    layout: str, vocabulary: int, *, num_rows: int = 1, length: int = 48, seed: int = 3
) -> Batch:
    """Make a batch of one layout; the rows of a batch are laid out differently.

    A few labels are -100, as in a prompt, and no token that follows padding has one.
    """
    generator = torch.Generator().manual_seed(seed)
    low = min(3, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (num_rows, length), generator=generator)
    documents = tuple(_documents(layout, row, length) for row in range(num_rows))
    positions = torch.zeros(num_rows, length, dtype=torch.long)
    mask = torch.zeros_like(positions)
    labels = torch.full_like(positions, IGNORED)
    for row, bounds in enumerate(documents):
        for start, end in bounds:
            positions[row, start:end] = torch.arange(end - start)
            mask[row, start:end] = 1
            labels[row, start + 1 : end] = ids[row, start + 1 : end]
    labels[:, 3:6] = IGNORED
    return Batch(ids, labels, positions, mask if layout.startswith("padded") else None, documents)


def _documents(layout: str, row: int, length: int) -> tuple[tuple[int, int], ...]:
    shift = 5 * row
    missing = length * 3 // 16 + shift
    match layout:
        case "plain":
            return ((0, length),)
        case "packed":
            first, second = length * 2 // 5 - shift, length * 3 // 5 + shift // 2
            return ((0, first), (first, second), (second, length))
        case "padded":
            return ((0, length - missing),)
        case "padded-left":
            return ((missing, length),)
    raise ValueError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
