"""The state of one training process under the adaptor, shared by everything that it replaces."""

import argparse
import sys
from typing import Any

from megatron.adaptor import data_cache
from megatron.adaptor.checkpoints import optimizer_state
from megatron.adaptor.checkpoints.helpers import Helpers
from megatron.adaptor.checkpoints.loading import Loading
from megatron.adaptor.checkpoints.room import Room
from megatron.adaptor.command_line.model_cost import token_cost
from megatron.adaptor.command_line.parsing import CommandLine
from megatron.adaptor.command_line.refusals import refuse
from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.layers import weight_gradients
from megatron.adaptor.layers.attention import Attention
from megatron.adaptor.layers.loss_recomputation import LossRecomputation
from megatron.adaptor.layers.multi_token_prediction import MultiTokenPrediction
from megatron.adaptor.layers.positions import Positions
from megatron.adaptor.layers.router_losses import RouterLosses
from megatron.adaptor.layers.transformer_engine import EngineConfiguration
from megatron.adaptor.offload import host_memory
from megatron.adaptor.offload.homes import Homes
from megatron.adaptor.offload.reductions import Reductions
from megatron.adaptor.offload.updates import Updates
from megatron.adaptor.patches import Attribute, Patch
from megatron.adaptor.ranks import Ranks
from megatron.adaptor.reports.console import print_first
from megatron.adaptor.reports.iteration_log import IterationLog
from megatron.adaptor.reports.metrics import StepMeter
from megatron.adaptor.reports.outlook import MemoryLine
from megatron.adaptor.request import Request
from megatron.adaptor.step.batch_feed import BatchCutter
from megatron.adaptor.step.loop import Loop
from megatron.adaptor.step.step import StepArguments
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
        self.homes = Homes(lambda: self.settings)
        self.reductions = Reductions()
        self.updates = Updates(lambda: self.settings)
        self.loop = Loop(self)
        self.args: argparse.Namespace | None = None
        self.request: Request | None = None
        self.has_stepped = False
        self.only_checks_flags = False
        self._settings: Settings | None = None
        self._requested: tuple[Any, Settings] | None = None
        self._knows_vocabulary = False

    @property
    def settings(self) -> Settings | None:
        """What the flags mean, or what was assigned in their place."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings | None) -> None:
        self._settings, self.args = settings, None
        self._apply(settings)

    @property
    def asked(self) -> "Settings | Request | None":
        """What the process is to run: what ``enable`` was given, or what the flags mean."""
        return self.request or self._settings

    def settings_for(self, arguments: StepArguments) -> Settings:
        """Return the settings of a step, which those of ``enable`` depend on; all ranks must call.

        Raises ValueError with every fault of the request for a model and a step like this one.
        """
        self.has_stepped = True
        if self.request is None:
            assert self._settings is not None
            return self._settings
        key = self.request, arguments.config, arguments.shape
        if self._requested is None or self._requested[0] != key:
            settings = self.request.settings(arguments)
            self._requested = key, settings
            self._settings = settings
            self._apply(settings)
        return self._requested[1]

    def accept(self, settings: Settings, args: argparse.Namespace) -> None:
        """Use the settings of a command line that has been checked."""
        if self.request is not None:
            raise RuntimeError(
                "megatron.adaptor.enable() was called, and Megatron's command line brings settings "
                "of its own: use either enable() or the flags"
            )
        if self.only_checks_flags:
            print_first(f"> flags accepted for {args.world_size} ranks")
            sys.exit(0)
        too_little = host_memory.shortage(args, settings)
        # The first rank of each machine reports it, because other machines may have more.
        refuse([too_little] if too_little else [], args.local_rank)
        self._settings, self.args = settings, args
        self._apply(settings)
        self.homes.prepare(args)

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
            *optimizer_state.patches(),
            *norms.patches(),
            *tokenizer.patches(),
            *CommandLine(self.accept).patches(),
            *Ranks(lambda: self.args).patches(),
            *data_cache.patches(),
            *Helpers(lambda: self.args).patches(),
            *Loading(lambda: self.args).patches(),
            *Room(lambda: self.args).patches(),
            *self.homes.patches(),
            *self.reductions.patches(),
            *self.updates.patches(),
            *self.loop.patches(),
            *self.meter.patches(),
            *IterationLog(self.meter, lambda: self.settings, lambda: self.args).patches(),
            *MemoryLine(self._cuts).patches(),
            *self.attention.patches(),
            *Positions(self.context).patches(),
            *self.router_losses.patches(),
            *MultiTokenPrediction(self.context, self.cutter).patches(),
            *LossRecomputation(self._recomputes_loss).patches(),
            *EngineConfiguration(lambda: self.asked).patches(),
            *weight_gradients.patches(self.context),
        ]

    def _cuts(self) -> bool:
        """Whether training runs on sub-sequences."""
        return self.settings is not None and self.settings.num_splits > 1

    def _recomputes_loss(self) -> bool:
        return self.settings is not None and self.settings.recompute_loss

    def _apply(self, settings: Settings | None) -> None:
        self.context.use_kernel(settings.kernel if settings else None)
        self.attention.is_replaced = settings is None or settings.replaces_attention
