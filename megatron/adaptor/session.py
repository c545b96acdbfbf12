"""The state of one training process under the adaptor, shared by everything that it replaces."""

import argparse

from megatron.adaptor.command_line.model_cost import token_cost
from megatron.adaptor.command_line.parsing import CommandLine
from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.layers import weight_gradients
from megatron.adaptor.layers.attention import Attention
from megatron.adaptor.layers.multi_token_prediction import MultiTokenPrediction
from megatron.adaptor.layers.positions import Positions
from megatron.adaptor.layers.router_losses import RouterLosses
from megatron.adaptor.layers.transformer_engine import EngineConfiguration
from megatron.adaptor.patches import Attribute, Patch
from megatron.adaptor.ranks import Ranks
from megatron.adaptor.reports.iteration_log import IterationLog
from megatron.adaptor.reports.metrics import StepMeter
from megatron.adaptor.reports.outlook import MemoryLine
from megatron.adaptor.step.batch_feed import BatchCutter
from megatron.adaptor.step.loop import Loop
from megatron.adaptor.without_engine import distributed_optimizer, fallbacks, norms, tokenizer
from seq1f1b.runtime import ExecutionContext


class Session:
    """There is one per process."""

    def __init__(self, device: str) -> None:
        self.context = ExecutionContext()
        self.cutter = BatchCutter(self.context)
        self.meter = StepMeter(self.context, device)
        self.attention = Attention(self.context)
        self.router_losses = RouterLosses(self.context)
        self.loop = Loop(self)
        self.args: argparse.Namespace | None = None
        self._settings: Settings | None = None
        self._knows_vocabulary = False

    @property
    def settings(self) -> Settings | None:
        """What the flags mean, or what was assigned in their place."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings | None) -> None:
        self._settings, self.args = settings, None
        self._apply(settings)

    def accept(self, settings: Settings, args: argparse.Namespace) -> None:
        """Use the settings of a command line that has been checked."""
        self._settings, self.args = settings, args
        self._apply(settings)

    def count_vocabulary(self) -> None:
        """Add the output layer to the model's cost once Megatron has built the tokenizer."""
        if self._knows_vocabulary or self._settings is None or self.args is None:
            return
        if getattr(self.args, "padded_vocab_size", None):
            self._knows_vocabulary = True
            self._settings = self._settings.with_cost(token_cost(self.args))

    def patches(self) -> list[Patch | Attribute]:
        """Return every replacement in Megatron-Core."""
        return [
            *fallbacks.patches(),
            *distributed_optimizer.patches(),
            *norms.patches(),
            *tokenizer.patches(),
            *CommandLine(self.accept).patches(),
            *Ranks(lambda: self.args).patches(),
            *self.loop.patches(),
            *self.meter.patches(),
            *IterationLog(self.meter, lambda: self.settings, lambda: self.args).patches(),
            *MemoryLine(self._cuts).patches(),
            *self.attention.patches(),
            *Positions(self.context).patches(),
            *self.router_losses.patches(),
            *MultiTokenPrediction(self.context, self.cutter).patches(),
            *EngineConfiguration(lambda: self.settings).patches(),
            *weight_gradients.patches(self.context),
        ]

    def _cuts(self) -> bool:
        """Whether training runs on sub-sequences."""
        return self.settings is not None and self.settings.num_splits > 1

    def _apply(self, settings: Settings | None) -> None:
        self.context.use_kernel(settings.kernel if settings else None)
        self.attention.is_replaced = settings is None or settings.replaces_attention
