"""Attention masks that scripts bring: are they what sub-sequences attend by?

Masks are Megatron's: boolean, ``[b or 1, 1 or heads, queries, keys]``, True where a key is hidden.
They are compared with the causal mask a block of rows at a time, so no second matrix of all pairs
is made.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seq1f1b.errors import Seq1F1BError
from seq1f1b.sequence import Documents

_ELEMENTS_AT_A_TIME = 2**22


class MaskError(Seq1F1BError, ValueError):
    """An attention mask that sub-sequences cannot honour."""


def is_causal(
    mask: Tensor,
    positions: Tensor | None = None,
    documents: Sequence[Documents] | None = None,
) -> bool:
    """Whether ``mask`` hides exactly the keys behind each query, and those of other documents.

    positions: of the queries among the keys, ``[queries]``; None if they are the last. documents:
    one entry per row; None if each row is one document.
    """
    return _hides(mask, documents, positions)


def check_mask(mask: Tensor, documents: Sequence[Documents] | None) -> None:
    """Raise MaskError unless ``mask`` is causal, within ``documents`` (one per row) if any."""
    if _hides(mask, documents):
        return
    wanted = "causal" if documents is None else "causal within each document"
    raise MaskError(
        f"the batch has an attention mask of shape {list(mask.shape)} that is not {wanted}, which "
        "is all that sub-sequences can attend by: leave it out, mark packed documents by "
        "--reset-attention-mask, or use --seq1f1b-splits 1"
    )


class CausalMasks:
    """Remembers the outcome for the mask that was checked last, which all layers share."""

    def __init__(self) -> None:
        self._checked: tuple[Tensor, int, Sequence[Documents] | None, bool] | None = None

    def is_causal(
        self,
        mask: Tensor,
        positions: Tensor | None = None,
        documents: Sequence[Documents] | None = None,
    ) -> bool:
        """See ``is_causal``; looks at the same mask of the same documents once."""
        if self._checked is not None:
            seen, version, of, outcome = self._checked
            if _is_same(seen, mask) and mask._version == version and of is documents:
                return outcome
        outcome = is_causal(mask, positions, documents)
        self._checked = mask.detach(), mask._version, documents, outcome
        return outcome

    def forget(self) -> None:
        """Let go of the mask."""
        self._checked = None


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )


def _hides(
    mask: Tensor, documents: Sequence[Documents] | None, positions: Tensor | None = None
) -> bool:
    if mask.dtype != torch.bool or mask.dim() < 2:
        return False
    *leading, num_queries, num_keys = mask.shape
    rows_of_batch = leading[0] if leading else 1
    if num_queries > num_keys:
        return False
    if documents is not None and (
        rows_of_batch not in (1, len(documents)) or num_queries != documents[0].total
    ):
        return False
    block = max(1, _ELEMENTS_AT_A_TIME // num_keys)
    keys = torch.arange(num_keys, device=mask.device)
    if positions is None:
        positions = keys[num_keys - num_queries :]
    starts = None if documents is None else _starts(documents, mask.device)
    for row, rows in enumerate(mask.reshape(rows_of_batch, -1, num_queries, num_keys)):
        for first in range(0, num_queries, block):
            queries = positions[first : first + block]
            hidden = keys > queries[:, None]
            if starts is not None:
                # A mask that all rows share has to fit each of them.
                of_rows = starts if rows_of_batch == 1 else starts[row : row + 1]
                if not (of_rows == of_rows[:1]).all():
                    return False
                hidden |= keys < of_rows[0, queries][:, None]
            if not (rows[:, first : first + block] == hidden).all():
                return False
    return True


def _starts(documents: Sequence[Documents], device: torch.device) -> Tensor:
    """Return where the document of every token begins, ``[rows, s]``."""
    return torch.stack(
        [
            torch.repeat_interleave(
                torch.tensor(of_row.starts), torch.tensor(of_row.ends) - torch.tensor(of_row.starts)
            )
            for of_row in documents
        ]
    ).to(device)
