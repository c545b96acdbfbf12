"""Updates of model chunks in host memory that run while the next step computes already."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from megatron.adaptor.patches import Patch
from seq1f1b.errors import Seq1F1BError

if TYPE_CHECKING:
    from megatron.adaptor.command_line.settings import Settings

_CHAIN = "megatron.core.optimizer.optimizer:ChainedOptimizer"
_BUFFER = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBuffer"
_WANT_ALL = (
    f"{_CHAIN}.prepare_grads",
    f"{_CHAIN}.state_dict",
    f"{_CHAIN}.sharded_state_dict",
    f"{_CHAIN}.save_parameter_state",
    "megatron.core.utils:check_param_hashes_across_dp_replicas",
    "megatron.training.checkpointing:save_checkpoint",
    "megatron.training.training:evaluate",
    "megatron.training.utils.common_utils:calc_params_l2_norm",
)


class UpdateError(Seq1F1BError, RuntimeError):
    """A model chunk's update failed after its step had ended; the cause is chained."""


class _Waiting(NamedTuple):
    """An update under way: the optimizers' parts that do it, and gradients that it reads."""

    parts: list[Any]
    buffers: list[Any]
    done: "Future[None]"


class Updates:
    """Just-in-time updates: model chunk 0 first, each of the others before it is loaded next.

    Norm, clipping and loss scaling are of all chunks together and come before. An update has the
    learning rate and weight decay of its own step. One thread does them in the order of the chunks;
    ``settle`` waits for one. Data-parallel ranks exchange updated weights there and not in the
    thread, so that all of them do so in the same order. Gradients stay until they are used: they
    are not zeroed while their update waits, and need not be, since the chunk's next visit
    overwrites them.
    """

    def __init__(self, settings: "Callable[[], Settings | None]") -> None:
        self._settings = settings
        self._waiting: dict[Any, _Waiting] = {}
        self._worker: ThreadPoolExecutor | None = None

    def patches(self) -> list[Patch]:
        """Return what is replaced around Megatron's optimizer, and around what reads weights."""
        return [
            Patch(f"{_CHAIN}.step_with_ready_grads", self.step),
            Patch(f"{_CHAIN}.zero_grad", self.zero_grad),
            Patch(f"{_BUFFER}.reset", self.reset),
            *(Patch(target, self.after_all) for target in _WANT_ALL),
            Patch("megatron.training.training:train", self.train),
        ]

    def step(self, original: Callable[..., Any], optimizer: Any) -> Any:
        """Update model chunks one after the other, behind the next step's forward."""
        settings = self._settings()
        if settings is None or not settings.offload_just_in_time or optimizer.is_stub_optimizer:
            return original(optimizer)
        optimizers = [one for one in optimizer.chained_optimizers if not one.is_stub_optimizer]
        assert not self._waiting, "updates of the step before are still under way"
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="updates")
        for chunk in optimizer.model_chunks:
            parts = [_part(one, chunk) for one in optimizers]
            buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
            self._waiting[chunk] = _Waiting(parts, buffers, self._worker.submit(_update, parts))
        return True

    def zero_grad(
        self, original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Leave gradients of updates under way, each of which drops its own."""
        return None if self._waiting else original(optimizer, *args, **kwargs)

    def reset(self, original: Callable[..., Any], buffer: Any) -> Any:
        """Leave gradients of updates under way; the chunk's next visit overwrites them."""
        if any(buffer is held for waiting in self._waiting.values() for held in waiting.buffers):
            return None
        return original(buffer)

    def after_all(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Wait for all updates before weights or states of the optimizer are read."""
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


def _await(waiting: _Waiting) -> None:
    try:
        waiting.done.result()
    except Exception as error:
        raise UpdateError(f"the optimizer's update of a model chunk failed: {error}") from error


@torch.no_grad()
def _update(parts: list[Any]) -> None:
    for part in parts:
        part.step_with_ready_grads()
        part.zero_grad()


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
