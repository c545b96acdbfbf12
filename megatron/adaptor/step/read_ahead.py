"""Facts that only the first stage can read from its data, and every stage needs before a step.

Megatron's own schedules send each shape ahead of its tensor, and its middle stages read no data.
With sub-sequences every stage has to know, before the first action, how long each micro-batch is
and where its documents begin: both decide where the micro-batch is cut. So the first stage reads
the step's micro-batches ahead, and one small tensor goes through the pipeline.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron.adaptor.step.batch_feed import BatchFeed
from seq1f1b.sequence import Documents

Source = Literal["cu_seqlens", "position_ids", "tokens"]


@dataclass(frozen=True)
class Packing:
    """How micro-batches mark where their documents begin.

    flag: the setting that packs. source: the entry of a batch that has the boundaries:
    cumulative lengths ``[b, any]``, positions that restart at 0 ``[b, s]``, or tokens ``[b, s]`` of
    which ``end_of_document()`` ends a document.
    """

    flag: str
    source: Source
    end_of_document: Callable[[], int] | None = None

    @property
    def hidden(self) -> tuple[str, ...]:
        """Entries that training scripts must not see.

        With ``cu_seqlens`` they would ask for Megatron's own packed attention, which cannot work on
        a part of a sequence.
        """
        return ("cu_seqlens", "cu_seqlens_padded") if self.source == "cu_seqlens" else ()

    def starts(self, batch: Mapping[str, Any], num_rows: int, total: int) -> Tensor:
        """Return which tokens are the first of a document, ``[num_rows, total]``.

        Raises ValueError when the batch lacks the source or has another shape.
        """
        given = batch.get(self.source)
        if given is None:
            raise ValueError(
                f"{self.flag}: documents are told apart by {self.source!r}, and the "
                f"micro-batch has only {', '.join(sorted(batch)) or 'nothing'}"
            )
        given = given.cpu()
        if given.shape[0] != num_rows or (
            self.source != "cu_seqlens" and given.shape != (num_rows, total)
        ):
            raise ValueError(
                f"{self.flag}: {self.source!r} of a micro-batch has shape {list(given.shape)}; "
                f"it has {num_rows} samples of {total} tokens"
            )
        starts = torch.zeros(num_rows, total, dtype=torch.bool)
        if self.source == "cu_seqlens":
            for row, bounds in zip(starts, given.long(), strict=True):
                row[bounds[bounds < total]] = True
        elif self.source == "position_ids":
            starts |= given == 0
        else:
            assert self.end_of_document is not None
            starts[:, 1:] = given[:, :-1] == self.end_of_document()
        starts[:, 0] = True
        return starts


def agree_on_lengths(feed: BatchFeed | None, groups: Any, *, num_micro_batches: int) -> list[int]:
    """Return the tokens per sequence of every micro-batch of the step; all ranks must call.

    ``feed`` is where this rank reads micro-batches; that of the first stage is read ahead.
    ``groups`` are Megatron's. Raises ValueError when the first stage cannot tell.
    """
    return _from_first_stage(
        groups,
        feed,
        num_micro_batches,
        derive=lambda batches: torch.tensor([_length(batch) for batch in batches]),
        like=torch.zeros(num_micro_batches, dtype=torch.int64),
    ).tolist()


def agree_on_documents(
    packing: Packing,
    feed: BatchFeed | None,
    groups: Any,
    *,
    num_micro_batches: int,
    num_rows: int,
    total: int,
) -> list[Sequence[Documents]]:
    """Return the documents of every micro-batch and row of the step; all ranks must call.

    ``feed`` is where this rank reads micro-batches; that of the first stage is read ahead.
    ``groups`` are Megatron's. Raises ValueError when the first stage has no data.
    """
    shape = num_micro_batches, num_rows, total

    def pack(batches: list[Any]) -> Tensor:
        if batches == [None]:
            raise ValueError(f"{packing.flag}: the first stage has no data to find documents in")
        starts = [packing.starts(batch, num_rows, total) for batch in batches]
        return torch.from_numpy(np.packbits(torch.stack(starts).numpy(), axis=-1))

    like = torch.zeros(num_micro_batches, num_rows, -(-total // 8), dtype=torch.uint8)
    bits = _from_first_stage(groups, feed, num_micro_batches, pack, like)
    flags = np.unpackbits(bits.numpy(), axis=-1, count=total).reshape(shape)
    return [
        [Documents(tuple(np.flatnonzero(row).tolist()), total) for row in rows] for rows in flags
    ]


def _length(batch: Any) -> int:
    names = ("tokens", "input_ids") if isinstance(batch, dict) else ()
    for name in names:
        if isinstance(batch.get(name), torch.Tensor):
            return int(batch[name].shape[1])
    raise ValueError(
        "variable_seq_lengths with sub-sequences: the data iterator of the first stage must "
        "give dicts with 'tokens' or 'input_ids' [b, s], from which all stages learn how long "
        "each micro-batch is"
    )


def _from_first_stage(
    groups: Any,
    feed: BatchFeed | None,
    num_micro_batches: int,
    derive: Callable[[list[Any]], Tensor],
    like: Tensor,
) -> Tensor:
    """Return what ``derive`` makes of the step's micro-batches, on the CPU; all ranks must call.

    The first rank of the first stage's tensor-parallel group, the only one that has data, reads
    ahead. ``derive`` gets [None] where there is no data. ``like`` has the result's shape and type.
    """
    value = like
    if groups.tp.rank() == 0:
        if groups.pp.rank() == 0:
            value = derive([None] if feed is None else feed.read_ahead(num_micro_batches))
        value = _broadcast(value, groups.pp)
    return _broadcast(value, groups.tp).cpu()


def _broadcast(value: Tensor, group: Any) -> Tensor:
    """Return the tensor of the first rank of ``group``; all must call, with the same shape."""
    if group.size() == 1:
        return value
    value = value.to(torch.cuda.current_device())
    torch.distributed.broadcast(value, group=group, group_src=0)
    return value
