"""Updates of model chunks in host memory that run beside computations."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.utils import get_model_config

from megatron.adaptor.offload.arrival import changes, changes_of, decisions, describe, parts_of
from megatron.adaptor.patches import Patch
from megatron.adaptor.reports.console import print_first
from seq1f1b.errors import Seq1F1BError

if TYPE_CHECKING:
    from megatron.adaptor.command_line.settings import Settings

_CHAIN = "megatron.core.optimizer.optimizer:ChainedOptimizer"
_BUFFER = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer"
_WANT_ALL = (
    f"{_CHAIN}.state_dict",
    f"{_CHAIN}.sharded_state_dict",
    f"{_CHAIN}.save_parameter_state",
    "megatron.core.utils:check_param_hashes_across_dp_replicas",
    "megatron.training.checkpointing:save_checkpoint",
    "megatron.training.training:evaluate",
    "megatron.training.utils.common_utils:calc_params_l2_norm",
)


class UpdateError(Seq1F1BError, RuntimeError):
    """A model chunk's update failed, with its cause chained, or other chunks' were left out."""


class Updates:
    """Just-in-time updates: each model chunk's before it is loaded next, beside computations.

    A chunk is updated on arrival of its complete gradients where nothing changes them after that
    (see ``arrival``), and else once the step has ended: norm, clipping and loss scaling, which are
    of all chunks together, come before. An update has the learning rate and weight decay of its own
    step. One thread does them, of those that wait the lowest chunk first, which is loaded first.
    ``settle`` waits for one. Data-parallel ranks exchange updated weights there and not in the
    thread, so that all of them do so in the same order. Gradients stay until they are used: they
    are not zeroed while their update waits, and need not be, since the chunk's next visit
    overwrites them.
    """

    def __init__(self, settings: "Callable[[], Settings | None]") -> None:
        self._settings = settings
        self._waiting: dict[Any, _Update] = {}
        self._queued: list[_Update] = []
        self._lock = Lock()  # of the queue
        self._worker: ThreadPoolExecutor | None = None
        self._optimizer: Any = None
        self._on_arrival: frozenset[Any] = frozenset()
        self._begun: list[Any] = []  # chunks that this step updates before its end
        self._has_told = False

    def patches(self) -> list[Patch]:
        """Return what is replaced around Megatron's optimizer, and around what reads weights."""
        return [
            Patch(f"{_CHAIN}.prepare_grads", self.prepare_grads),
            Patch(f"{_CHAIN}.step_with_ready_grads", self.step),
            Patch(f"{_CHAIN}.zero_grad", self.zero_grad),
            Patch(f"{_BUFFER}.reset", self.reset),
            *(Patch(target, self.after_all) for target in _WANT_ALL),
            Patch("megatron.training.training:train", self.train),
        ]

    def begin(self, chunks: Sequence[Any], *, trains: bool) -> None:
        """Begin a step of ``chunks`` (Megatron's DDP), and choose those to update on arrival.

        Raises UpdateError after a step that was left between updates.
        """
        self._check_whole()
        self._on_arrival = frozenset()
        settings, optimizer = self._settings(), self.optimizer_of(chunks)
        if not trains or settings is None or not settings.offload_just_in_time or optimizer is None:
            return
        of_all = decisions(optimizer) + changes(optimizer, get_model_config(chunks[0]))
        found = [of_all or changes_of(chunk) for chunk in chunks]
        self._on_arrival = frozenset(
            chunk for chunk, flags in zip(chunks, found, strict=True) if not flags
        )
        if not self._has_told:
            self._has_told = True
            print_first(describe(found))

    def optimizer_of(self, chunks: Sequence[Any]) -> Any:
        """Return the optimizer whose gradients were zeroed last, if it is that of ``chunks``."""
        optimizer = self._optimizer
        is_theirs = optimizer is not None and set(chunks) <= set(optimizer.model_chunks)
        return optimizer if is_theirs else None

    def expect(self, chunk: Any, arrived: Callable[[], None]) -> None:
        """Update ``chunk`` once ``arrived`` returns, if its gradients are then complete."""
        if chunk in self._on_arrival:
            self._start(self._optimizer, chunk, arrived)
            self._begun.append(chunk)

    def prepare_grads(self, original: Callable[..., bool], optimizer: Any) -> bool:
        """Wait for updates of the step before, and prepare gradients of this step's only once."""
        if not self._begun:
            self.settle_all()
            return original(optimizer)
        for chunk in optimizer.model_chunks:
            if chunk in self._begun:
                self._waiting[chunk].prepare()
            else:
                for part in _parts(optimizer, chunk):
                    part.prepare_grads()
        return False

    def step(self, original: Callable[..., Any], optimizer: Any) -> Any:
        """Update model chunks one after the other, behind the next step's forward."""
        settings = self._settings()
        if settings is None or not settings.offload_just_in_time or optimizer.is_stub_optimizer:
            return original(optimizer)
        assert self._waiting.keys() == set(self._begun), "updates of the step before are under way"
        options = _options(optimizer)
        for chunk in optimizer.model_chunks:
            if chunk in self._begun:
                if self._waiting[chunk].options != options:
                    raise UpdateError(
                        "the optimizer's learning rate or other options changed between a step's "
                        "backward and its update, when some model chunks had been updated: leave "
                        "--offload-just-in-time-updates out"
                    )
                self._waiting[chunk].release()
            else:
                self._start(optimizer, chunk)
        self._begun = []
        return True

    def zero_grad(
        self, original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Leave gradients of updates under way, each of which drops its own."""
        self._optimizer = optimizer
        return None if self._waiting else original(optimizer, *args, **kwargs)

    def reset(self, original: Callable[..., Any], buffer: Any) -> Any:
        """Leave gradients of updates under way; the chunk's next visit overwrites them."""
        if any(buffer is held for waiting in self._waiting.values() for held in waiting.buffers):
            return None
        return original(buffer)

    def after_all(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for all updates before weights or states of the optimizer are read."""
        self._check_whole()
        self.settle_all()
        return original(*args, **kwargs)

    def train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for the last step's updates, whose failure is the training's."""
        try:
            result = original(*args, **kwargs)
        except SystemExit:
            for waiting in self._waiting.values():
                _await(waiting)
            raise
        self.settle_all()
        return result

    def are_under_way(self, chunk: Any) -> bool:
        """Whether the update of ``chunk`` (Megatron's DDP) has not been waited for."""
        return chunk in self._waiting

    def settle(self, chunk: Any) -> None:
        """Wait for the update of ``chunk``; all its data-parallel ranks must call.

        Raises UpdateError if it failed.
        """
        waiting = self._waiting.get(chunk)
        if waiting is None:
            return
        _await(waiting)
        del self._waiting[chunk]
        waiting.parts[0].start_param_sync_for_bucket_group_subset()

    def settle_all(self) -> None:
        """Wait for all updates; see ``settle``."""
        for chunk in list(self._waiting):
            self.settle(chunk)

    def _start(self, optimizer: Any, chunk: Any, arrived: Callable[[], None] | None = None) -> None:
        """Queue an update, of gradients that have ``arrived`` or, without, are prepared."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="updates")
        number = optimizer.model_chunks.index(chunk)
        update = self._waiting[chunk] = _Update(number, optimizer, chunk, arrived)
        with self._lock:
            self._queued.append(update)
        self._worker.submit(self._do_next)

    def _do_next(self) -> None:
        with self._lock:
            update = min(self._queued, key=lambda queued: queued.number)
            self._queued.remove(update)
        update.run()

    def _check_whole(self) -> None:
        if self._begun:
            raise UpdateError(
                f"a step was left when {len(self._begun)} of this stage's model chunks had begun "
                "to be updated and the others had not: resume from the last checkpoint"
            )


class _Update:
    """An update of one model chunk, with the learning rate and weight decay of now.

    number: of the chunk. options: of all groups of parameters. buffers: of gradients that it reads.
    done: when it is, or has failed.
    """

    def __init__(
        self, number: int, optimizer: Any, chunk: Any, arrived: Callable[[], None] | None
    ) -> None:
        self.number, self.parts = number, _parts(optimizer, chunk)
        self.options = _options(optimizer)
        self.buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
        self.done: Future[None] = Future()
        self._arrived = arrived
        self._num_readers = 1 if arrived is None else 2
        self._lock = Lock()

    def prepare(self) -> None:
        """Have the gradients of this update made of those that arrive, unless they are."""
        with self._lock:
            if self._arrived is not None:
                self._arrived()
                for part in self.parts:
                    part.prepare_grads()
                self._arrived = None

    def release(self) -> None:
        """Drop its gradients when both the update and the norm of all gradients have read them."""
        with self._lock:
            self._num_readers -= 1
            if self._num_readers == 0:
                for part in self.parts:
                    part.zero_grad()

    @torch.no_grad()
    def run(self) -> None:
        """Do it; what it raises is its result."""
        try:
            self.prepare()
            for part in self.parts:
                part.step_with_ready_grads()
            self.release()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


def _await(waiting: _Update) -> None:
    try:
        waiting.done.result()
    except Exception as error:
        raise UpdateError(f"the optimizer's update of a model chunk failed: {error}") from error


def _options(optimizer: Any) -> list[dict[str, Any]]:
    """Return learning rate, weight decay and what else each group of parameters has."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _parts(optimizer: Any, chunk: Any) -> list[Any]:
    """Return Megatron's chain of distributed optimizers for one model chunk."""
    return [_part(one, chunk) for one in parts_of(optimizer)]


def _part(optimizer: Any, chunk: Any) -> Any:
    """Return Megatron's distributed ``optimizer`` for one model chunk, sharing all tensors.

    Its step has the learning rate and weight decay of now, takes no times and exchanges no weights.
    """
    own = set(chunk.parameters())
    part = copy.copy(optimizer)
    part.model_chunks = [chunk]
    part.config = copy.copy(optimizer.config)
    part.config.timers = None
    part._defer_param_sync = True
    kept = set()
    for models, shards in (
        ("model_float16_groups", ("shard_float16_groups", "shard_fp32_from_float16_groups")),
        ("model_fp32_groups", ("shard_fp32_groups",)),
    ):
        groups = getattr(optimizer, models)
        places = [[n for n, parameter in enumerate(group) if parameter in own] for group in groups]
        for name in (models, *shards):
            whole = getattr(optimizer, name)
            chosen = [
                [group[n] for n in of_group] for group, of_group in zip(whole, places, strict=True)
            ]
            setattr(part, name, chosen)
            kept |= {id(tensor) for group in chosen for tensor in group}
    part.optimizer = _with_groups(
        optimizer.optimizer,
        [
            {**group, "params": [p for p in group["params"] if id(p) in kept]}
            for group in optimizer.optimizer.param_groups
        ],
    )
    return part


def _with_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> Any:
    """Return the same optimizer, with the same state, of other groups of parameters."""
    # copy.copy would leave out what torch does not pickle
    other = object.__new__(type(optimizer))
    other.__dict__ = {**optimizer.__dict__, "param_groups": groups}
    return other
