"""Gradients of transformer-engine's layers, added up over sub-sequences and deferred to a W."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatron.adaptor.patches import Patch


class EngineConfiguration:
    """Configures Transformer Engine's layers by the ``settings`` of the process, if it has any."""

    def __init__(self, settings: Callable[[], Any]) -> None:
        self._settings = settings

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's configuration of a model."""
        config = "megatron.core.transformer.transformer_config:TransformerConfig"
        return [Patch(f"{config}.__post_init__", self.configure)]

    def configure(self, original: Callable[[Any], None], config: Any) -> None:
        """Let Transformer Engine's layers add up gradients of sub-sequences, deferred to any W.

        Its layers take the first forward of a step for the first backward too: there they overwrite
        the gradient buffer instead of adding to it. Of sub-sequences the first is the last to go
        back, and would wipe out the others' gradients. Without a cache of transposed weights the
        layers always add. Megatron allows ``delay_wgrad_compute`` for its own overlap of experts
        only.
        """
        settings = self._settings()
        if settings is None or not settings.runs_executor:
            original(config)
            return
        if settings.splits_backwards:
            config.delay_wgrad_compute = False  # in a copy of a configuration it is set
        original(config)
        config.disable_parameter_transpose_cache = True
        config.delay_wgrad_compute |= settings.splits_backwards


class DelayedWeightGradients:
    """The weight gradients that the ``modules`` of one model chunk have deferred, oldest first.

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
        """Whether any layer defers weight gradients."""
        return bool(self._layers)

    @torch.no_grad()
    def compute_next(self) -> None:
        """Add each layer's oldest deferred gradient to the gradient buffers."""
        for layer, store in self._layers:
            if store.context.qsize():
                layer.backward_dw()

    def drop(self) -> None:
        """Forget what is deferred, of a step that failed."""
        for _, store in self._layers:
            while store.context.qsize():
                store.context.get()

    def check_empty(self) -> None:
        """Assert that nothing is deferred any more, as it must be at the end of every step."""
        left = [type(layer).__name__ for layer, store in self._layers if store.context.qsize()]
        assert not left, f"weight gradients never computed: {', '.join(left)}"
