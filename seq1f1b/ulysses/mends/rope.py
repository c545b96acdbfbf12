"""Rotary embeddings whose frequencies follow from the longest position: they get the group's."""

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from seq1f1b.ulysses.mends.replaced import replace_forward
from seq1f1b.ulysses.run import current_run

_FOLLOWS_LENGTH = ("dynamic", "longrope")


def mend_rope(model: nn.Module) -> None:
    """Let rotary embeddings see the furthest position and the length of the whole group's rows.

    Dynamic NTK and LongRoPE (arXiv 2402.13753) choose frequencies by the largest position they are
    shown; older code builds tables of ``seq_len`` positions.
    """
    for module in model.modules():
        if "Rotary" not in type(module).__name__:
            continue
        parameters = inspect.signature(module.forward).parameters
        if "position_ids" in parameters and _follows_length(module):
            replace_forward(module, _with_furthest_position)
        elif "seq_len" in parameters:
            replace_forward(module, _with_whole_length)


def _follows_length(module: nn.Module) -> bool:
    described = [getattr(module, "rope_type", "")]
    config = getattr(module, "config", None)
    described += [getattr(config, name, "") for name in ("rope_parameters", "rope_scaling")]
    return any(name in str(x) for x in described for name in _FOLLOWS_LENGTH)


def _with_furthest_position(
    original: MethodType,
    module: nn.Module,
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    run = current_run()
    if run is None:
        return original(x, position_ids, *args, **kwargs)
    furthest = int(run.rows.positions.max())
    beyond = position_ids.new_full((*position_ids.shape[:-1], 1), furthest)
    found = original(x, torch.cat([position_ids, beyond], dim=-1), *args, **kwargs)
    if isinstance(found, tuple):
        return tuple(each[..., :-1, :] for each in found)
    return found[..., :-1, :]


def _with_whole_length(original: MethodType, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run = current_run()
    if run is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    if bound.arguments.get("seq_len") is not None:
        furthest = int(run.rows.positions.max()) + 1
        bound.arguments["seq_len"] = max(run.rows.length, furthest)
    return original(*bound.args, **bound.kwargs)
