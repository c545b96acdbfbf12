"""The loss in tiles of tokens, through the model's own head: few logits are alive at a time.

A causal language model is a body that makes hidden states and a forward that makes logits and a
loss of them. The body runs once. Then the model's own forward runs once for each tile, with the
body replaced by a stub that hands out that tile of the hidden states, and is recomputed in the
backward pass. So soft-capping, scaling and the like need no code of their own here.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seq1f1b.ulysses.run import Run

_USUAL = ("model", "transformer", "backbone")
_INNER = ("", ".decoder", ".language_model", ".model")
"""Where bodies are, below the attribute that transformers calls base_model_prefix or another."""


class _Captured(Exception):
    """The body has run; the rest of the model's forward is not wanted."""


class _Stub(nn.Module):
    """Runs the real body once and keeps its output; afterwards hands out parts of it."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        vars(self)["real"] = real
        self.output: Any = None
        self.part: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.part is None:
            self.output = vars(self)["real"](*args, **kwargs)
            raise _Captured
        if isinstance(self.output, tuple):
            return (self.part, *self.output[1:])
        output = copy.copy(self.output)
        output["last_hidden_state"] = self.part
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["real"], name)


def body_paths(model: nn.Module) -> list[str]:
    """Return names of modules that may be the body, the likeliest first."""
    outer = dict.fromkeys([getattr(model, "base_model_prefix", ""), *_USUAL])
    names = {name for name, _ in model.named_modules()} - {""}
    return [path for prefix in outer for inner in _INNER if (path := prefix + inner) in names]


def tiled_loss(
    run: Run,
    model: nn.Module,
    body: str,
    forward: Callable[..., tuple[Any, Tensor]],
    targets: Tensor,
    tile: int,
) -> Any:
    """Return the model's output with the loss of all tiles, and without logits.

    body: the name of the module to stand in for. forward: runs the model's own forward on the
    targets of a tile, or on None, and returns its output and its loss; its second argument says
    whether this is the first tile, the only one to which losses of routers belong. targets
    ``[b, n]``.
    """
    stub = _Stub(model.get_submodule(body))
    with _standing_in(model, body, stub):
        try:
            forward(None, True)
        except _Captured:
            pass
        else:
            raise RuntimeError(f"{type(model).__name__} did not run its {body}")
    hidden = stub.output[0]
    kept: dict[str, Any] = {}

    def piece(part: Tensor, part_targets: Tensor, is_first: bool) -> Tensor:
        with _standing_in(model, body, stub):
            stub.part = part
            output, loss = forward(part_targets, is_first)
        if is_first:
            kept.update(kind=type(output), aux_loss=getattr(output, "aux_loss", None))
        return loss

    bound = run.bind(piece)
    losses = []
    tiles = zip(hidden.split(tile, dim=1), targets.split(tile, dim=1), strict=True)
    for index, (part, part_targets) in enumerate(tiles):
        if torch.is_grad_enabled():
            losses.append(checkpoint(bound, part, part_targets, index == 0, use_reentrant=False))
        else:
            losses.append(bound(part, part_targets, index == 0))
    output = kept["kind"](loss=torch.stack(losses).sum())
    if kept["aux_loss"] is not None:
        output["aux_loss"] = kept["aux_loss"].detach()
    return output


@contextmanager
def _standing_in(model: nn.Module, body: str, stub: _Stub) -> Iterator[None]:
    """Put the stub in the body's place inside."""
    path, _, name = body.rpartition(".")
    parent = model.get_submodule(path)
    real = parent._modules[name]
    parent._modules[name] = stub
    try:
        yield
    finally:
        parent._modules[name] = real
