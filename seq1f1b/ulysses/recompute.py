"""Activation recomputation: a layer that runs again must see the forward pass it ran in first."""

from collections.abc import Callable
from typing import Any

from torch import nn

from seq1f1b.ulysses.run import current_run

_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Where transformers' layers and torch's CheckpointWrapper keep what recomputes them."""


class Recomputation:
    """Calls a function of checkpointing with what it shall recompute, bound to the running pass."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = current_run()
        return self.checkpoint(function if run is None else run.bind(function), *args, **kwargs)


def bind_recomputation(model: nn.Module) -> None:
    """Bind every layer that has been told to recompute since the last call."""
    for module in model.modules():
        for name in _FUNCTIONS:
            found = vars(module).get(name)
            if found is not None and not isinstance(found, Recomputation):
                vars(module)[name] = Recomputation(found)
