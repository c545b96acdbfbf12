"""What lets the gradients of transformer-engine's layers add up over sub-sequences."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatron.adaptor.settings import Settings


def configuring(
    settings: Callable[[], Settings | None],
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make the replacement of ``TransformerConfig.__post_init__``.

    Its layers take the first forward of a step for the first backward too: there they overwrite
    the gradient buffer instead of adding to it. Of sub-sequences the first is the last to go back,
    and would wipe out the others' gradients. Without a cache of transposed weights the layers
    always add. Megatron grants ``delay_wgrad_compute`` to its own overlap of experts only.
    """

    def replacement(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def configure(self: Any) -> None:
            current = settings()
            if current is None or not current.runs_executor:
                original(self)
                return
            if current.splits_backwards:
                self.delay_wgrad_compute = False  # in a copy of a configuration it is set
            original(self)
            self.disable_parameter_transpose_cache = True
            self.delay_wgrad_compute |= current.splits_backwards

        return configure

    return replacement


class DelayedWeightGradients:
    """The weight gradients that the ``modules`` of one model chunk have put off, oldest first.

    Layers do not say which sub-sequence a gradient is of: as each W computes one per layer, and
    sums do not depend on the order, all are computed when the last W is.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        stores = ((module, getattr(module, "wgrad_store", None)) for module in modules)
        self._layers: Sequence[tuple[Any, Any]] = [
            (module, store)
            for module, store in stores
            if store is not None and store.delay_wgrad_compute()
        ]

    @property
    def has_layers(self) -> bool:
        """Whether any layer puts weight gradients off."""
        return bool(self._layers)

    @torch.no_grad()
    def compute_next(self) -> None:
        """Add the oldest gradient that waits in each layer to the gradient buffers."""
        for layer, store in self._layers:
            if store.context.qsize():
                layer.backward_dw()

    def check_empty(self) -> None:
        """Assert that nothing waits any more, as it must be at the end of every step."""
        waiting = [type(layer).__name__ for layer, store in self._layers if store.context.qsize()]
        assert not waiting, f"weight gradients never computed: {', '.join(waiting)}"
