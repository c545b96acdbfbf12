"""Micro-batches of packed documents, as Megatron's data sets hand them out."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

END = 0
"""The token that ends a document."""


def random_lengths(total: int, generator: torch.Generator) -> list[int]:
    """Draw lengths of documents that fill a sample, one-token documents among them."""
    number = int(torch.randint(1, 6, (), generator=generator))
    places = torch.randperm(total - 1, generator=generator)[: number - 1] + 1
    ends = [0, *sorted(places.tolist()), total]
    return [after - before for before, after in pairwise(ends)]


def block_mask(lengths: list[int]) -> Tensor:
    """Return Megatron's mask ``[1, s, s]`` of packed documents: True where nothing is seen."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ~(owner[:, None] == owner[None]).tril()[None]


def packed(
    batch: dict[str, Any], source: str, generator: torch.Generator
) -> tuple[dict[str, Any], Tensor]:
    """Return ``batch`` as packed documents that ``source`` tells apart, and its mask."""
    rows, total = batch["tokens"].shape
    lengths = [random_lengths(total, generator) for _ in range(rows)]
    tokens = batch["tokens"].clamp(min=END + 1)
    positions = torch.arange(total).repeat(rows, 1)
    bounds = torch.full((rows, total + 1), total, dtype=torch.int32)
    for row, documents in enumerate(lengths):
        ends = torch.tensor(documents).cumsum(0)
        bounds[row, 0], bounds[row, 1 : len(ends) + 1] = 0, ends
        tokens[row, ends[:-1] - 1] = END
        if source != "tokens":
            positions[row] = torch.cat([torch.arange(length) for length in documents])
    packing = {"tokens": tokens, "position_ids": positions}
    if source == "cu_seqlens":
        packing["cu_seqlens"] = bounds
    return {**batch, **packing}, torch.stack([block_mask(documents) for documents in lengths])
