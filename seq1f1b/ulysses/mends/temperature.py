"""Attention temperature that grows with the position (arXiv 2501.19399), as Llama 4 has it."""

from typing import Any

import torch
from torch import Tensor, nn

from seq1f1b.ulysses.rows import Rows
from seq1f1b.ulysses.run import Run

_MARK = "seq1f1b_temperature"


def mend_temperature(model: nn.Module) -> None:
    """Take the scaling of queries away from layers that count positions within their shard."""
    module: Any
    for module in model.modules():
        if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale"):
            if not getattr(module, "use_rope", True):
                vars(module)[_MARK] = float(module.floor_scale), float(module.attn_scale)
            module.attn_temperature_tuning = False


def scale_queries(module: nn.Module, query: Tensor, run: Run) -> Tensor:
    """Return ``query [b, heads, shard, dim]`` times the layer's temperature, if it has one."""
    settings = vars(module).get(_MARK)
    if settings is None:
        return query
    floor_scale, attn_scale = settings
    places = run.on(query.device, "temperature", lambda: _places(run.rows)[:, run.own])
    steps = torch.floor((places.float() + 1.0) / floor_scale)
    scales = torch.log1p(steps) * attn_scale + 1.0
    return (query * scales[:, None, :, None]).to(query.dtype)


def _places(rows: Rows) -> Tensor:
    """Return each token's place in its document; in a row of one document, its place in the row.

    Left padding counts, as it does in transformers.
    """
    places = torch.arange(rows.length)
    return torch.where(rows.is_packed[:, None], places - rows.starts, places)
