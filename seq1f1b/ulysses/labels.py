"""Labels that are targets already: shifted by one token, and marked, so that this happens once."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


class ShiftedLabels(Tensor):
    """Targets ``[b, n]``: entry i is what token i has to predict, or -100.

    A tensor like any other, whose type says that the shift is done. The type survives moves and
    copies; what is computed from it is a plain tensor. ``fingerprint`` tells whole rows apart, so
    that ranks which were given different rows by mistake find out.
    """

    fingerprint: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in _WHOLE and isinstance(result, Tensor):
            return mark(result, getattr(args[0], "fingerprint", None))
        if func in _PARTS:
            parts = (mark(x) for x in result) if isinstance(result, tuple) else mark(result)
            return tuple(parts) if isinstance(result, tuple) else parts
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShiftedLabels":
        return mark(unmark(self).clone(), self.fingerprint)


_WHOLE = frozenset(
    {
        Tensor.to,
        Tensor.cuda,
        Tensor.cpu,
        Tensor.clone,
        Tensor.contiguous,
        Tensor.detach,
        Tensor.long,
        Tensor.pin_memory,
    }
)
_PARTS = frozenset({Tensor.__getitem__, Tensor.chunk, Tensor.split, torch.chunk, torch.split})


def mark(targets: Tensor, fingerprint: Tensor | None = None) -> ShiftedLabels:
    """Return ``targets`` as ShiftedLabels, without a copy."""
    marked = targets.as_subclass(ShiftedLabels)
    marked.fingerprint = fingerprint
    return marked


def unmark(labels: Tensor) -> Tensor:
    """Return the labels as a plain tensor, without a copy."""
    return labels.as_subclass(Tensor)


def shift_labels(
    labels: Tensor, position_ids: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> ShiftedLabels:
    """Turn labels as Hugging Face has them into targets, over whole rows ``[b, s]``.

    Token i's target is label i + 1; the last token of every document has none. A document starts
    where ``position_ids`` do not rise, or at a border of ``cu_seqlens`` (cumulative lengths of
    one row, from 0). Raises ValueError for labels that are shifted already or not two-dimensional.
    """
    if isinstance(labels, ShiftedLabels):
        raise ValueError("these labels are shifted already: shift_labels takes them as they were")
    if labels.ndim != 2:
        raise ValueError(f"labels must be [batch, tokens], not {tuple(labels.shape)}")
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    if position_ids is not None:
        positions = expand_rows(position_ids, labels.shape, "position_ids")
        restarts = positions[:, 1:] <= positions[:, :-1]
        targets[:, :-1].masked_fill_(restarts.to(targets.device), IGNORED)
    if cu_seqlens is not None:
        if labels.shape[0] != 1:
            raise ValueError(f"cu_seqlens describe one row; labels have {labels.shape[0]}")
        ends = cu_seqlens.flatten()[1:].to(targets.device, torch.long)
        targets[:, ends[ends <= labels.shape[1]] - 1] = IGNORED
    return mark(targets)


def expand_rows(x: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return ``x``, ``[b, n]`` or ``[1, n]``, as ``shape``; raise ValueError when it is neither."""
    if x.ndim == 1:
        x = x[None]
    if x.ndim != 2 or x.shape[1] != shape[1] or x.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"{name} must be [batch, tokens] like the tokens {tuple(shape)}, not {tuple(x.shape)}"
        )
    return x.expand(shape)
