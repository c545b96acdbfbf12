"""The documents in a step's micro-batches, which all stages agree upon before the first action.

Megatron's middle stages read no data, and where documents end decides where every stage cuts and
what it attends to. So the first stage reads the micro-batches of the step ahead, and one small
tensor with a bit per token goes through the pipeline.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron.adaptor.agreement import from_first_stage
from megatron.adaptor.batch import Replay
from seq1f1b.sequence import Documents

Source = Literal["cu_seqlens", "position_ids", "tokens"]


@dataclass(frozen=True)
class Packing:
    """How micro-batches say where their documents begin.

    source: the entry of a batch that says it: cumulative lengths ``[b, any]``, positions that go
    back to 0 ``[b, s]``, or tokens ``[b, s]`` of which ``end_of_document()`` is a document's last.
    flag: the flag of Megatron that packs.
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

        Raises ValueError when the batch does not say, or has another shape.
        """
        given = batch.get(self.source)
        if given is None:
            raise ValueError(
                f"{self.flag}: documents are told apart by {self.source!r}, and the micro-batch "
                f"has only {', '.join(sorted(batch)) or 'nothing'}"
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


def agree_on_documents(
    packing: Packing,
    replay: Replay | None,
    groups: Any,
    *,
    num_micro_batches: int,
    num_rows: int,
    total: int,
) -> list[Sequence[Documents]]:
    """Return the documents of every micro-batch and row of the step; all ranks must call.

    ``replay`` is where this rank reads micro-batches; that of the first stage is read ahead.
    ``groups`` are Megatron's. Raises ValueError when the first stage has no data.
    """
    shape = num_micro_batches, num_rows, total

    def pack(batches: list[Any]) -> Tensor:
        if batches == [None]:
            raise ValueError(f"{packing.flag}: the first stage has no data to find documents in")
        starts = [packing.starts(batch, num_rows, total) for batch in batches]
        return torch.from_numpy(np.packbits(torch.stack(starts).numpy(), axis=-1))

    like = torch.zeros(num_micro_batches, num_rows, -(-total // 8), dtype=torch.uint8)
    bits = from_first_stage(groups, replay, num_micro_batches, pack, like)
    flags = np.unpackbits(bits.numpy(), axis=-1, count=total).reshape(shape)
    return [
        [Documents(tuple(np.flatnonzero(row).tolist()), total) for row in rows] for rows in flags
    ]
