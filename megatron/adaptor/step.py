"""A training or evaluation step of Megatron, run by the executor of Seq1F1B."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron.adaptor.batch import BatchCutter, Replay
from megatron.adaptor.documents import agree_on_documents
from megatron.adaptor.lengths import agree_on_lengths
from megatron.adaptor.loss import TokenExactLoss
from megatron.adaptor.settings import Settings
from megatron.adaptor.transformer_engine import DelayedWeightGradients
from seq1f1b.runtime import (
    ALL_CHANNELS,
    ONE_CHUNK,
    ActionClock,
    Channel,
    ExecutionContext,
    PointToPoint,
    connect,
    execute,
    point_to_point,
)
from seq1f1b.schedule import Action, Kind, Schedule


class Step:
    """Everything that one call of Megatron's ``forward_backward_func`` works with."""

    def __init__(
        self,
        settings: Settings,
        context: ExecutionContext,
        cutter: BatchCutter,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> None:
        if adjust_tensor_shapes_fn is not None or p2p_communicator is not None:
            raise ValueError(
                "Seq1F1B does its own pipeline communication: distillation and multi-module "
                "pipelines need --seq1f1b-splits 1"
            )
        self.chunks: list[Any] = model if isinstance(model, list) else [model]
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        hidden = settings.packing.hidden if settings.packing else ()
        self.replays = [None if it is None else Replay(it, hidden) for it in iterators]
        self.config = get_model_config(self.chunks[0])
        self.groups = pg_collection or schedules._build_default_pg_collection()
        self.settings, self.context, self.cutter = settings, context, cutter
        self.forward_step_func = forward_step_func
        self.num_micro_batches = num_microbatches
        self.micro_batch_size = micro_batch_size
        self.forward_only = forward_only
        self.collect_non_loss_data = collect_non_loss_data
        self.first_val_step = first_val_step
        self.force_all_reduce = force_all_reduce
        self.length = decoder_seq_length or seq_length
        self.parts = [settings.cut(self.length)] * num_microbatches
        self.stage = self.groups.pp.rank()
        self.schedule = settings.schedule(
            self.groups.pp.size(), len(self.chunks), num_microbatches, trains=not forward_only
        )
        self.num_tokens = torch.zeros([], dtype=torch.int, device=torch.cuda.current_device())
        self.loss = TokenExactLoss(
            cutter,
            per_token=self.config.calculate_per_token_loss,
            num_shares=self.groups.cp.size(),
        )
        self.gradient_sync = _GradientSync(self)
        self.delayed = [
            DelayedWeightGradients(chunk.modules() if settings.splits_backwards else ())
            for chunk in self.chunks
        ]

    def run(self, groups: Mapping[Channel, Any], clock: ActionClock) -> list[Any]:
        """Run the step and return one report per micro-batch (on the last stage)."""
        embedding = self._begin()
        self._vary_lengths()
        with self._packed():
            execute(
                self.schedule.stages[self.stage],
                self,
                self._transport(groups),
                self.context,
                self.parts,
                clock,
                stage=self.stage,
            )
        self._finish(embedding)
        return self.loss.reports

    def forward(self, action: Action, received: Tensor | None) -> Tensor:
        """See Computation."""
        replay = self.replays[action.chunk]
        if replay is not None and action.sub_sequence == 0:
            replay.go_on()
        self.cutter.forget()
        is_last = self.schedule.downstream(self.stage, action.chunk) is None
        interleaved = self.schedule.num_chunks > 1
        store: list[Any] = []
        output, num_tokens = schedules.forward_step(
            self._forward_step_of(action),
            replay,
            self.chunks[action.chunk],
            self.num_micro_batches,
            received,
            store,
            self.config,
            cp_group_size=self.groups.cp.size(),
            collect_non_loss_data=self.collect_non_loss_data,
            is_first_microbatch=schedules.check_first_val_step(
                self.first_val_step,
                self.forward_only,
                action.micro_batch == 0 and action.sub_sequence == 0,
            ),
            current_microbatch=action.micro_batch,
            vp_stage=action.chunk if interleaved else None,
            is_last_stage=is_last,
        )
        self.num_tokens += num_tokens
        if store:
            self.loss.collect(action, store[0])
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

    def _vary_lengths(self) -> None:
        """Cut each micro-batch by its own length, if lengths differ."""
        self.context.lengths_vary = self.config.variable_seq_lengths
        if not self.config.variable_seq_lengths:
            return
        if self.settings.packing is not None:
            raise ValueError(
                f"{self.settings.packing.flag} and variable_seq_lengths cannot both be used with "
                "sub-sequences: leave one of them out"
            )
        lengths = agree_on_lengths(
            self.replays[0], self.groups, num_micro_batches=self.num_micro_batches
        )
        self.parts = [self.settings.cut(length) for length in lengths]

    @contextlib.contextmanager
    def _packed(self) -> Iterator[None]:
        """Let attention and the cut of each micro-batch follow its documents, if it has several."""
        if self.settings.packing is None:
            yield
            return
        documents = agree_on_documents(
            self.settings.packing,
            self.replays[0],
            self.groups,
            num_micro_batches=self.num_micro_batches,
            num_rows=self.micro_batch_size,
            total=self.length,
        )
        self.parts = [self.settings.cut(self.length, rows) for rows in documents]
        self.context.documents = documents
        try:
            yield
        finally:
            self.context.documents = None

    def _forward_step_of(self, action: Action) -> Callable[..., Any]:
        def forward_step(*args: Any) -> tuple[Tensor, Callable[..., Any] | None]:
            output, loss_function = self.forward_step_func(*args)
            return output, loss_function and self.loss.wrap(action, loss_function)

        return forward_step

    def _transport(self, groups: Mapping[Channel, Any]) -> PointToPoint:
        num_shares = self.groups.cp.size()
        if self.config.sequence_parallel:
            num_shares *= self.groups.tp.size()

        def shape(action: Action) -> tuple[int, ...]:
            length = self.parts[action.micro_batch][action.sub_sequence].length
            return length // num_shares, self.micro_batch_size, self.config.hidden_size

        device = torch.cuda.current_device()
        return point_to_point(self.groups.pp, device)(
            self.schedule,
            self.stage,
            ranks=torch.distributed.get_process_group_ranks(self.groups.pp),
            groups=groups,
            shape=shape,
            dtype=self.config.pipeline_dtype or self.config.params_dtype,
            device=device,
        )

    @property
    def _is_last_rank(self) -> bool:
        return self.stage == self.schedule.num_stages - 1

    def _begin(self) -> Any:
        if self.config.timers is not None:
            barrier = self.config.barrier_with_L1_time
            self.config.timers("forward-backward", log_level=1).start(barrier=barrier)
        self.gradient_sync.begin()
        if self.forward_only or self.config.finalize_model_grads_func is None:
            return None
        model = self.chunks if len(self.chunks) > 1 else self.chunks[0]
        return schedules.clear_embedding_activation_buffer(self.config, model, self._is_last_rank)

    def _finish(self, embedding: Any) -> None:
        for delayed in self.delayed:
            delayed.check_empty()
        self.gradient_sync.finish()
        config = self.config
        if config.finalize_model_grads_func is not None and not self.forward_only:
            schedules.finish_embedding_wgrad_compute(
                config, embedding, self._is_last_rank, self.groups.tp
            )
            config.finalize_model_grads_func(
                self.chunks,
                self.num_tokens if config.calculate_per_token_loss else None,
                pg_collection=self.groups,
                force_all_reduce=self.force_all_reduce,
            )
        if config.timers is not None:
            config.timers("forward-backward").stop()


class _GradientSync:
    """Lets data-parallel reduction start with the action that closes a model chunk's gradients.

    That is its last B or W; until then Megatron's ``no_sync`` contexts are open. With
    ``grad_sync_func`` set (aligned reduction) Megatron wants to start it itself, after them all.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._open: contextlib.ExitStack | None = None
        self._synced: set[int] = set()
        own = step.schedule.stages[step.stage]
        last = {a.chunk: a for a in own if a.kind in (Kind.B, Kind.W)}
        self._closing = frozenset(last.values())

    def begin(self) -> None:
        self._disable()
        sync_parameters = self._step.config.param_sync_func
        if sync_parameters is not None and not self._step.forward_only:
            for chunk, start in zip(self._step.chunks, self._listed(sync_parameters), strict=True):
                start(chunk.parameters())

    @contextlib.contextmanager
    def around(self, action: Action) -> Iterator[None]:
        """Let Megatron's hooks start the reduction if ``action`` is a B that closes a chunk."""
        if action not in self._closing or self._step.config.grad_sync_func is not None:
            yield
            return
        self._enable()
        self._synced.add(action.chunk)
        yield
        if len(self._synced) < len(self._step.chunks):
            self._disable()

    def after_weight_gradients(self, action: Action) -> None:
        """Do what Megatron's hooks do if ``action`` closes a chunk with gradients that waited.

        The hooks ran in the last backward, when the gradients were not complete.
        """
        chunk = self._step.chunks[action.chunk]
        with self.around(action):
            if action in self._closing and chunk.ddp_config.overlap_grad_reduce:
                for parameter, bucket_group in chunk.param_to_bucket_group.items():
                    bucket_group.register_grad_ready(parameter, chunk.force_all_reduce)

    def finish(self) -> None:
        self._enable()
        start_sync = self._step.config.grad_sync_func
        if start_sync is None or self._step.forward_only:
            return
        for chunk, start in zip(self._step.chunks, self._listed(start_sync), strict=True):
            start(chunk.parameters())

    def _listed(self, function: Any) -> list[Any]:
        return function if isinstance(function, list) else [function] * len(self._step.chunks)

    def _disable(self) -> None:
        no_sync = self._step.config.no_sync_func
        if no_sync is None or self._open is not None:
            return
        self._open = contextlib.ExitStack()
        for enter in no_sync if isinstance(no_sync, list) else [no_sync]:
            self._open.enter_context(enter())

    def _enable(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def make_channel_groups(pipeline: Any, *, interleaved: bool) -> dict[Channel, Any]:
    """Make and connect a process group per channel of this rank's pipeline; all ranks must call.

    ``pipeline``, Megatron's own group of the pipeline, serves the first channel.
    """
    own = torch.distributed.get_process_group_ranks(pipeline)
    pipelines: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pipelines, own)
    each = sorted({tuple(ranks) for ranks in pipelines})
    first, *others = ALL_CHANNELS if interleaved else ONE_CHUNK
    groups = {first: pipeline}
    for channel in others:
        groups[channel], _ = torch.distributed.new_subgroups_by_enumeration(each)
    is_staged = torch.distributed.get_backend(pipeline) == "gloo"
    connect(groups, pipeline.rank(), own, "cpu" if is_staged else torch.cuda.current_device())
    return groups


def describe(schedule: Schedule) -> str:
    """Return the one line that says what will run."""
    return (
        f"{schedule.name}: {schedule.num_stages} stages x {schedule.num_chunks} model chunks, "
        f"{schedule.num_micro_batches} micro-batches x {schedule.num_splits} sub-sequences"
    )
