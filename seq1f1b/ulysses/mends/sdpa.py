"""The door for code that calls ``F.scaled_dot_product_attention`` itself."""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seq1f1b.ulysses.attention import Scoring, group_attention
from seq1f1b.ulysses.errors import UnsupportedModelError
from seq1f1b.ulysses.interface import LazyMask
from seq1f1b.ulysses.rows import Pattern
from seq1f1b.ulysses.run import Run, current_run

_SDPA = torch.nn.functional.scaled_dot_product_attention


class SdpaDoor(TorchFunctionMode):
    """Within it, calls of torch's attention see the whole group's rows."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        run = current_run()
        if func is not _SDPA or run is None:
            return func(*args, **kwargs)
        return _attention(run, *args, **kwargs)


def _attention(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute what torch's function computes; tensors are ``[b, heads, shard, dim]``.

    Raises UnsupportedModelError when the mask is anything but causal, with or without the shard's
    own padding.
    """
    module = _caller()
    name = "the model" if module is None else type(module).__name__
    if query.ndim != 4 or query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"{name} calls scaled_dot_product_attention with queries {tuple(query.shape)} and keys "
            f"{tuple(key.shape)}: sequence parallelism covers [batch, heads, tokens, dim] of one "
            f"sequence, without a cache"
        )
    run.check_length(query.shape[2], name)
    pattern = Pattern()
    if isinstance(attn_mask, LazyMask):
        pattern = attn_mask.pattern
    elif attn_mask is not None:
        _check_causal(run, attn_mask, name)
    elif not is_causal and run.shard > 1:
        raise UnsupportedModelError(f"{name} lets every token see later ones (no causal mask)")
    scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else scale, None, dropout_p)
    return group_attention(run, id(module), query, key, value, pattern, scoring)


def _check_causal(run: Run, mask: Tensor, name: str) -> None:
    """Raise UnsupportedModelError unless the mask hides later tokens, padding and nothing else.

    mask: ``[b or 1, heads or 1, shard, shard]``, True where seen, or added to scores. Rows of
    padding do not matter.
    """
    n = run.shard
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    wanted = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    matters = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=mask.device)
    alternatives = [wanted[None, None]]
    if run.rows.is_real is not None:
        real = run.rows.is_real[:, run.own].to(mask.device)
        alternatives.append(wanted & real[:, None, None, :])
        matters = real[:, None, :, None]
    is_square = mask.ndim == 4 and mask.shape[-2:] == wanted.shape
    if not is_square or not any(bool((~matters | (seen == each)).all()) for each in alternatives):
        raise UnsupportedModelError(
            f"{name} brings a mask {tuple(mask.shape)} that is not plainly causal: windows and "
            f"documents of its own, made from one shard, would be wrong for the whole sequence"
        )
    if mask.dtype != torch.bool and bool((mask[seen.expand_as(mask)] != 0).any()):
        raise UnsupportedModelError(
            f"{name} adds a bias to attention scores (ALiBi or the like), made from one shard's "
            f"positions"
        )


def _caller() -> nn.Module | None:
    """Return the innermost module that is running Python code now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None
