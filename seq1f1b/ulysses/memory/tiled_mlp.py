"""MLPs that compute a tile of tokens at a time: only one tile's intermediate values are alive."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seq1f1b.ulysses.mends.replaced import replace_forward

_NAMES = ("MLP", "Mlp", "FeedForward")
_LINEAR = ("Linear", "Conv1D")


def tile_mlps(model: nn.Module, tile: int) -> None:
    """Let every MLP of ``model`` compute ``tile`` tokens at a time, and again in the backward pass.

    Raises ValueError when the model has no module that is an MLP by its name and its layers.
    """
    found = [module for module in model.modules() if _is_mlp(module)]
    if not found:
        raise ValueError(
            f"mlp_tile: {type(model).__name__} has no module of class ...MLP; leave mlp_tile out"
        )
    for module in found:
        vars(module)["seq1f1b_tile"] = tile
        replace_forward(module, _in_tiles)


def _is_mlp(module: nn.Module) -> bool:
    linear = [x for x in module.children() if any(n in type(x).__name__ for n in _LINEAR)]
    return type(module).__name__.endswith(_NAMES) and len(linear) >= 2


def _in_tiles(original: Any, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute ``x [..., tokens, width]``; modules with further arguments compute as ever."""
    tile = vars(module)["seq1f1b_tile"]
    if args or kwargs or x.ndim < 2:
        return original(x, *args, **kwargs)
    # Conv1D views its input; of several rows, a tile is not contiguous
    parts = [part.contiguous() for part in x.split(tile, dim=-2)]
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(original, p, use_reentrant=False) for p in parts], dim=-2)
    return torch.cat([original(part) for part in parts], dim=-2)
