"""Sequence lengths that differ between micro-batches, which all stages agree upon before a step.

Megatron's own schedules send each shape ahead of its tensor. Here every stage has to know where
each micro-batch is cut, so the first one reads the step ahead and says how long its micro-batches
are.
"""

from typing import Any

import torch

from megatron.adaptor.agreement import from_first_stage
from megatron.adaptor.batch import Replay


def agree_on_lengths(replay: Replay | None, groups: Any, *, num_micro_batches: int) -> list[int]:
    """Return the tokens per sequence of every micro-batch of the step; all ranks must call.

    ``replay`` is where this rank reads micro-batches; that of the first stage is read ahead.
    ``groups`` are Megatron's. Raises ValueError when the first stage cannot tell.
    """
    return from_first_stage(
        groups,
        replay,
        num_micro_batches,
        derive=lambda batches: torch.tensor([_length(batch) for batch in batches]),
        like=torch.zeros(num_micro_batches, dtype=torch.int64),
    ).tolist()


def _length(batch: Any) -> int:
    if not isinstance(batch, dict) or not isinstance(batch.get("tokens"), torch.Tensor):
        raise ValueError(
            "variable_seq_lengths with sub-sequences: the data iterator of the first stage must "
            "give dicts with 'tokens' [b, s], from which all stages learn how long each "
            "micro-batch is"
        )
    return int(batch["tokens"].shape[1])
