"""Pad whole rows to a multiple of the group's size, and take this rank's part of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from seq1f1b.ulysses.labels import (
    IGNORED,
    ShiftedLabels,
    expand_rows,
    mark,
    shift_labels,
    unmark,
)
from seq1f1b.ulysses.mesh import sequence_parallel


def pad_for_sequence_parallel(
    input_ids: Tensor,
    labels: Any = None,
    position_ids: Any = None,
    attention_mask: Tensor | None = None,
    *,
    padding_value: float | None = None,
    dim: int | None = None,
    tokens_pad_index: int = 0,
    labels_pad_index: int = IGNORED,
    position_ids_pad_index: int = 0,
    attention_mask_pad_index: int = 0,
) -> Any:
    """Lengthen whole rows on the right until the group's size divides them.

    Takes ``input_ids [b, s]`` with ``labels``, ``position_ids`` (or None) and, as a fourth,
    ``attention_mask`` (0 at padding); returns those four. Where tokens are added and there was no
    mask, one is made: padding has label -100 and position 0, and is masked, so it changes no value.
    A label right behind masked tokens is dropped: padding would have to predict it.

    ``pad_for_sequence_parallel(tensor, padding_value, dim=-1)`` pads one tensor of any shape.
    Raises ValueError when the tensors do not belong together.
    """
    per_tensor = _one_tensor("padding_value", labels, padding_value)
    if per_tensor is not None:
        chosen = position_ids if isinstance(position_ids, int) else dim
        return _pad_one(input_ids, per_tensor, -1 if chosen is None else chosen)
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids must be whole rows [batch, tokens], not {tuple(input_ids.shape)}; for one "
            f"tensor of another shape call pad_for_sequence_parallel(tensor, padding_value, dim)"
        )
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)} differ"
        )
    if position_ids is not None:
        position_ids = expand_rows(position_ids, input_ids.shape, "position_ids")
    if attention_mask is not None:
        _check_mask(attention_mask, input_ids)
        labels = _drop_labels_behind_padding(labels, attention_mask)
    missing = -input_ids.shape[1] % sequence_parallel().size
    if not missing:
        return input_ids, labels, position_ids, attention_mask
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    return (
        _lengthen(input_ids, missing, tokens_pad_index),
        _lengthen(labels, missing, labels_pad_index),
        _lengthen(position_ids, missing, position_ids_pad_index),
        _lengthen(attention_mask, missing, attention_mask_pad_index),
    )


def split_for_sequence_parallel(
    input_ids: Tensor,
    labels: Any = None,
    position_ids: Any = None,
    *,
    cu_seqlens: Tensor | None = None,
    dim: int | None = None,
    sp_group: ProcessGroup | None = None,
) -> Any:
    """Take this rank's part of whole rows; labels are shifted first.

    ``input_ids [b, s]``, ``labels`` and ``position_ids`` (or None) become ``[b, s / size]`` each.
    The labels returned are targets: entry i is what token i predicts, and the last token of each
    document, found by ``position_ids`` or ``cu_seqlens``, predicts nothing. So
    ``(labels != -100).sum()`` counts targets. This holds at size 1 too.

    ``split_for_sequence_parallel(tensor, dim, sp_group=None)`` splits one tensor of any shape.
    Raises ValueError when the size does not divide the length: pad first.
    """
    per_tensor = _one_tensor("dim", labels, dim)
    if per_tensor is not None:
        group = position_ids if position_ids is not None else sp_group
        return _split_one(input_ids, int(per_tensor), group)
    if input_ids.ndim != 2:
        raise ValueError(
            f"input_ids must be whole rows [batch, tokens], not {tuple(input_ids.shape)}; for one "
            f"tensor of another shape call split_for_sequence_parallel(tensor, dim)"
        )
    if position_ids is not None:
        position_ids = expand_rows(position_ids, input_ids.shape, "position_ids")
    elif cu_seqlens is not None:
        position_ids = positions_of(cu_seqlens, input_ids.shape[1]).to(input_ids.device)
    if labels is not None:
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} and input_ids {tuple(input_ids.shape)} differ"
            )
        if not isinstance(labels, ShiftedLabels):
            labels = shift_labels(labels, position_ids, cu_seqlens)
        labels = mark(unmark(labels), fingerprint(input_ids, labels))
    return tuple(
        None if x is None else _split_one(x, 1, None) for x in (input_ids, labels, position_ids)
    )


def positions_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return positions ``[1, length]`` that restart at each of the cumulative lengths.

    What lies behind the last of them is padding and has position 0.
    """
    bounds = cu_seqlens.flatten().to(torch.long)
    tokens = torch.arange(length, device=bounds.device)
    starts = bounds[torch.bucketize(tokens, bounds, right=True) - 1]
    return torch.where(tokens < bounds[-1], tokens - starts, 0)[None]


def _one_tensor(name: str, second: Any, keyword: Any) -> Any:
    """Return the second argument of the form that takes one tensor; None for the other form."""
    if isinstance(second, Tensor) or (second is None and keyword is None):
        return None
    if second is not None and keyword is not None:
        raise TypeError(f"{name} is given twice")
    value = keyword if second is None else second
    if not isinstance(value, int | float):
        raise TypeError(f"expected labels or {name}, not {type(value).__name__}")
    return value


def _check_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be [batch, tokens] like input_ids {tuple(input_ids.shape)}, "
            f"not {tuple(attention_mask.shape)}: a mask over pairs of tokens is never needed here"
        )


def _drop_labels_behind_padding(labels: Tensor | None, attention_mask: Tensor) -> Tensor | None:
    if labels is None or isinstance(labels, ShiftedLabels):
        return labels
    is_real = attention_mask.bool()
    behind = pad(is_real[:, 1:] & ~is_real[:, :-1], (1, 0)).to(labels.device)
    return labels.masked_fill(behind, IGNORED)


def _lengthen(x: Tensor | None, missing: int, value: float) -> Tensor | None:
    if x is None:
        return None
    longer = pad(x, (0, missing), value=value)
    return mark(longer) if isinstance(x, ShiftedLabels) else longer


def _pad_one(x: Tensor, value: float, dim: int) -> Tensor:
    missing = -x.shape[dim] % sequence_parallel().size
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    longer = torch.cat([unmark(x), x.new_full(shape, value)], dim=dim)
    return mark(longer) if isinstance(x, ShiftedLabels) else longer


def _split_one(x: Tensor, dim: int, group: ProcessGroup | None) -> Tensor:
    parallel = sequence_parallel()
    size, rank = parallel.size, parallel.rank
    if group is not None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = x.shape[dim]
    if length % size:
        raise ValueError(
            f"{length} tokens cannot be split over {size} ranks: call pad_for_sequence_parallel "
            f"first"
        )
    part = length // size
    own = unmark(x).narrow(dim, rank * part, part).contiguous()
    if isinstance(x, ShiftedLabels):
        return mark(own, x.fingerprint)
    return own


def fingerprint(input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return a number that whole rows with another token or target are unlikely to have."""
    tokens, targets = input_ids.flatten().long(), unmark(labels).flatten().long()
    places = torch.arange(1, tokens.numel() + 1, device=tokens.device)
    return (tokens * places * 2654435761 + targets.to(tokens.device) * places * 40503).sum()
