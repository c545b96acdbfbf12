"""Context parallelism through all-to-all: all heads of some tokens for all tokens of some heads.

Megatron cuts a sequence into 2 c pieces for c ranks and gives rank r pieces r and 2 c - 1 - r.
Sub-sequences are cut out first and dealt out in the same way, so that after the exchange a rank
has a whole sub-sequence of its share of the heads, and carries keys and values of those heads only
(DeepSpeed-Ulysses, arXiv 2309.14509, section 3.1).
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


def to_heads(group: Any, tensor: Tensor) -> Tensor:
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
    received = all_to_all(group, shares.reshape(size * length, batch, heads // size, dim))
    early, late = received.view(size, 2, length // 2, batch, heads // size, dim).unbind(1)
    return torch.cat((early, late.flip(0))).flatten(0, 1)


def to_tokens(group: Any, tensor: Tensor) -> Tensor:
    """Undo ``to_heads``: from ``[n, b, heads / c, dim]`` to ``[n / c, b, heads, dim]``."""
    size = group.size()
    length, batch, heads, dim = tensor.shape
    early, late = tensor.reshape(2, size, length // (2 * size), batch, heads, dim)
    dealt = torch.stack((early, late.flip(0)), dim=1).flatten(0, 2)
    shares = all_to_all(group, dealt).view(size, length // size, batch, heads, dim)
    return shares.permute(1, 2, 0, 3, 4).flatten(2, 3)
