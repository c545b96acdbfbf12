"""A training or evaluation step of Megatron, run by the executor of Seq1F1B."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron.adaptor.layers.transformer_engine import DelayedWeightGradients
from megatron.adaptor.offload.slots import ChunkSlots
from megatron.adaptor.step.batch_feed import BatchCutter, BatchFeed
from megatron.adaptor.step.forward_steps import ForwardSteps
from megatron.adaptor.step.gradient_sync import GradientSync
from megatron.adaptor.step.loss import Losses
from seq1f1b.runtime import ActionClock, ExecutionContext, Transport, execute
from seq1f1b.schedule import Action, Kind, Plan
from seq1f1b.sequence import Documents


@dataclass
class StepArguments:
    """What Megatron passes to a ``forward_backward_func``."""

    forward_step_func: Callable[..., Any]
    data_iterator: Any
    model: Any
    num_microbatches: int
    seq_length: int
    micro_batch_size: int
    decoder_seq_length: int | None = None
    forward_only: bool = False
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    adjust_tensor_shapes_fn: Callable[..., Any] | None = None
    p2p_communicator: Any = None
    pg_collection: Any = None
    force_all_reduce: bool | None = False

    def __post_init__(self) -> None:
        self.groups = self.pg_collection or schedules._build_default_pg_collection()
        link = self.p2p_communicator
        is_plain = link is None or (
            type(link) is P2PCommunicator and link.pp_group is getattr(self.groups, "pp", None)
        )
        if self.adjust_tensor_shapes_fn is not None or not is_plain:
            raise ValueError(
                "Seq1F1B does its own pipeline communication: distillation and multi-module "
                "pipelines need --seq1f1b-splits 1"
            )

    @property
    def chunks(self) -> list[Any]:
        """This stage's model chunks."""
        return self.model if isinstance(self.model, list) else [self.model]

    @property
    def config(self) -> Any:
        """Megatron's configuration of the model."""
        return get_model_config(self.chunks[0])

    @property
    def length(self) -> int:
        """Tokens of a sequence, unless they vary between micro-batches."""
        return self.decoder_seq_length or self.seq_length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Tokens of a sequence, rows and number of micro-batches, and model chunks."""
        return self.length, self.micro_batch_size, self.num_microbatches, len(self.chunks)

    @property
    def trains(self) -> bool:
        """Whether the step goes backward."""
        return not self.forward_only

    @property
    def num_shares(self) -> int:
        """Ranks that have the tokens of a sub-sequence among them between layers."""
        tensor = self.groups.tp.size() if self.config.sequence_parallel else 1
        return self.groups.cp.size() * tensor

    def feeds(self, hidden: Sequence[str], *, repeats: bool) -> list[BatchFeed | None]:
        """Return the data of each model chunk; None where this rank has none."""
        listed = (
            self.data_iterator if isinstance(self.data_iterator, list) else [self.data_iterator]
        )
        return [None if it is None else BatchFeed(it, hidden, repeats=repeats) for it in listed]


class Step:
    """The computations of one step on this stage.

    plan: what runs. feeds: data of each model chunk. documents: of each micro-batch's rows, if they
    are packed. splits_backwards: whether weight gradients have actions of their own. is_checked:
    see ForwardSteps. stage: whose actions to run, if not this rank's. slots: where the plan's model
    chunks visit the device.
    """

    def __init__(
        self,
        arguments: StepArguments,
        plan: Plan,
        context: ExecutionContext,
        cutter: BatchCutter,
        feeds: Sequence[BatchFeed | None],
        *,
        documents: Sequence[Sequence[Documents]] | None = None,
        splits_backwards: bool = False,
        is_checked: bool = False,
        stage: int | None = None,
        slots: ChunkSlots | None = None,
    ) -> None:
        self.slots = slots
        self.arguments, self.plan, self.context, self.cutter = arguments, plan, context, cutter
        self.feeds, self.documents = feeds, documents
        self.config, self.chunks, self.groups = arguments.config, arguments.chunks, arguments.groups
        self.stage = self.groups.pp.rank() if stage is None else stage
        self.num_tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        self.reports: dict[int, Any] = {}
        self.losses = Losses(
            micro_batch_size=arguments.micro_batch_size,
            num_micro_batches=arguments.num_microbatches,
            per_token=self.config.calculate_per_token_loss,
            context_group=self.groups.cp,
            trains=arguments.trains,
        )
        self.forward_steps = ForwardSteps(
            arguments.forward_step_func,
            context,
            cutter,
            self.losses,
            feeds,
            plan.cuts,
            context_group=self.groups.cp,
            batch_groups=(self.groups.tp, self.groups.cp),
            trains=arguments.trains,
            is_checked=is_checked,
        )
        self.gradient_sync = GradientSync(
            plan.schedule.stages[self.stage], self.chunks, self.config, trains=arguments.trains
        )
        self.delayed = [
            DelayedWeightGradients(chunk.modules() if splits_backwards else ())
            for chunk in self.chunks
        ]

    def run(self, transport: Transport, clock: ActionClock) -> list[Any]:
        """Run the step and return one report per micro-batch (on the last stage)."""
        with self._timed():
            embedding = self._begin()
            with self._visiting(), self.gradient_sync.step(), self._delayed_weight_gradients():
                execute(
                    self.plan.schedule.stages[self.stage],
                    self,
                    transport,
                    self.context,
                    self.plan.cuts,
                    clock,
                    stage=self.stage,
                    documents=self.documents,
                    lengths_vary=self.config.variable_seq_lengths,
                    visits=self.slots,
                )
                self.forward_steps.check()
            self._finish(embedding)
        return [self.reports[micro_batch] for micro_batch in sorted(self.reports)]

    def forward(self, action: Action, received: Tensor | None) -> Tensor:
        """See Computation."""
        schedule, arguments = self.plan.schedule, self.arguments
        feed = self.feeds[action.chunk]
        if feed is not None:
            feed.select(action.micro_batch)
        self.cutter.forget()
        is_last = schedule.downstream(self.stage, action.chunk) is None
        store: list[Any] = []
        output, num_tokens = schedules.forward_step(
            self.forward_steps.of(action, is_last_stage=is_last),
            feed,
            self.chunks[action.chunk],
            arguments.num_microbatches,
            received,
            store,
            self.config,
            cp_group_size=self.groups.cp.size(),
            collect_non_loss_data=arguments.collect_non_loss_data,
            is_first_microbatch=schedules.check_first_val_step(
                arguments.first_val_step,
                arguments.forward_only,
                action.micro_batch == 0 and action.sub_sequence == 0,
            ),
            current_microbatch=action.micro_batch,
            vp_stage=action.chunk if schedule.num_chunks > 1 else None,
            is_last_stage=is_last,
        )
        self.num_tokens += num_tokens
        if self.plan.cuts[action.micro_batch][action.sub_sequence].is_last:
            if feed is not None:
                feed.release(action.micro_batch)
            if store:
                self.reports[action.micro_batch] = store[0]
        return output

    def backward(
        self, action: Action, received: Tensor | None, output: Tensor, gradient: Tensor | None
    ) -> Tensor | None:
        """See Computation."""
        arguments = received, output, gradient, self.config
        if action.kind is Kind.B and self.delayed[action.chunk].has_layers:
            input_gradient = schedules.backward_step(*arguments)
            self.weight_gradients(action)
            return input_gradient
        with self.gradient_sync.around(action):
            return schedules.backward_step(*arguments)

    def weight_gradients(self, action: Action) -> None:
        """See Computation."""
        self.context.weight_gradients.compute(action)
        self.delayed[action.chunk].compute_next()
        self.gradient_sync.after_weight_gradients(action)

    def output_sent(self, output: Tensor) -> None:
        """See Computation."""
        schedules.deallocate_output_tensor(output, self.config.deallocate_pipeline_outputs)

    @property
    def _is_last_rank(self) -> bool:
        return self.stage == self.plan.schedule.num_stages - 1

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        if self.config.timers is None:
            yield
            return
        barrier = self.config.barrier_with_L1_time
        self.config.timers("forward-backward", log_level=1).start(barrier=barrier)
        try:
            yield
        finally:
            self.config.timers("forward-backward").stop()

    @contextlib.contextmanager
    def _visiting(self) -> Iterator[None]:
        if self.slots is None:
            yield
            return
        reduces = (
            self.config.finalize_model_grads_func is finalize_model_grads
            and not self.arguments.force_all_reduce
        )
        self.slots.begin(self.plan.schedule, self.stage, reduces=reduces)
        try:
            yield
        finally:
            self.slots.end()

    @contextlib.contextmanager
    def _delayed_weight_gradients(self) -> Iterator[None]:
        try:
            yield
            for delayed in self.delayed:
                delayed.check_empty()
        except BaseException:
            for delayed in self.delayed:
                delayed.drop()
            raise

    def _begin(self) -> Any:
        if self.arguments.forward_only or self.config.finalize_model_grads_func is None:
            return None
        model = self.chunks if len(self.chunks) > 1 else self.chunks[0]
        return schedules.clear_embedding_activation_buffer(self.config, model, self._is_last_rank)

    def _finish(self, embedding: Any) -> None:
        config = self.config
        if config.finalize_model_grads_func is None or self.arguments.forward_only:
            return
        schedules.finish_embedding_wgrad_compute(
            config, embedding, self._is_last_rank, self.groups.tp
        )
        config.finalize_model_grads_func(
            self.chunks,
            self.num_tokens if config.calculate_per_token_loss else None,
            pg_collection=self.groups,
            force_all_reduce=self.arguments.force_all_reduce,
        )
