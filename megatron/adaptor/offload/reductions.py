"""Checks, reductions and norms of a model chunk's gradients, before they leave the device.

There they read the device's memory and exchange over its links. At home each would read all
gradients again, from memory that Adam needs, and data-parallel ranks would exchange them over gloo.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron.adaptor.cpu import device
from megatron.adaptor.offload.arrival import changes, changes_of, parts_of
from megatron.adaptor.patches import Patch

_BUCKETS = "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup"
_OPTIMIZER = "megatron.core.optimizer.optimizer:MegatronOptimizer"


class Reductions:
    """Has Megatron check and reduce a chunk's gradients in their slot, and notes norms of them.

    At the end of the step Megatron finds these gradients reduced, and checks the norms of their
    buckets. The norm of all gradients comes from the norms of each parameter's, for parameters
    whose gradients nothing changes after the reduction (see ``arrival``). All norms are those that
    Megatron would compute at home.
    """

    def __init__(self) -> None:
        self._optimizer: Any = None
        self._final: frozenset[Any] = frozenset()  # chunks
        self._reduced: dict[Any, list[Tensor]] = {}  # norms of each bucket, by group of buckets
        self._norms: dict[Tensor, Tensor] = {}  # of gradients, by the optimizer's weights
        self._homes: dict[Any, Tensor] = {}  # of the norms, by chunk

    def patches(self) -> list[Patch]:
        """Return what is replaced where Megatron reduces gradients and takes their norm."""
        return [
            Patch(f"{_BUCKETS}.start_grad_sync", self.start_grad_sync),
            Patch(f"{_OPTIMIZER}.get_grads_for_grad_norm", self.get_grads_for_grad_norm),
        ]

    def begin(self, chunks: Sequence[Any], optimizer: Any) -> None:
        """Begin a step of ``chunks`` (Megatron's DDP).

        optimizer: Megatron's chain for them; None if the norm of their gradients is not known to be
        taken.
        """
        self._optimizer, self._final = optimizer, frozenset()
        self._reduced, self._norms = {}, {}
        if optimizer is not None and not changes(optimizer, get_model_config(chunks[0])):
            self._final = frozenset(chunk for chunk in chunks if not changes_of(chunk))

    def reduce(self, chunk: Any, gradients: Mapping[Any, Tensor]) -> None:
        """Queue Megatron's reduction of the complete gradients of ``chunk``, and their norms.

        gradients: on the device, all of them for each of the chunk's flat buffers. All
        data-parallel ranks must call, in the same order. Norms may be read when the step has ended.
        """
        places = {
            bucket: gradients[buffer][bucket.offset :][: bucket.grad_data.numel()]
            for buffer in gradients
            for bucket in buffer.buckets
        }
        groups = [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]
        norms: list[Tensor] = []
        for group in groups:
            of_group = [places[bucket] for bucket in group.buckets]
            if any(_checks(group)):
                norms += [place.norm(p=2) for place in of_group]
            with _reading(group, of_group), _unchecked(group):
                group.start_grad_sync()
        shards = self._shards(chunk, gradients) if chunk in self._final else {}
        norms += [torch.linalg.vector_norm(g, dtype=torch.float32) for g in shards.values()]
        arriving = iter(self._take_home(chunk, norms))
        for group in groups:
            self._reduced[group] = [next(arriving) for _ in group.buckets if any(_checks(group))]
        self._norms |= dict(zip(shards, arriving, strict=True))

    def start_grad_sync(
        self, original: Callable[..., None], buckets: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Leave gradients alone that have been reduced, and check the norms they had before."""
        norms = self._reduced.pop(buckets, None)
        if norms is None:
            original(buckets, *args, **kwargs)
        elif norms:
            with _reading(buckets, norms):
                buckets.check_grads(*_checks(buckets))

    def get_grads_for_grad_norm(
        self, original: Callable[..., list[Tensor]], optimizer: Any, *args: Any, **kwargs: Any
    ) -> list[Tensor]:
        """Return norms in place of the gradients that they are of."""
        known = {w.grad.data_ptr(): n for w, n in self._norms.items() if w.grad is not None}
        gradients = original(optimizer, *args, **kwargs)
        return [known.get(gradient.data_ptr(), gradient) for gradient in gradients]

    def _shards(self, chunk: Any, gradients: Mapping[Any, Tensor]) -> dict[Tensor, Tensor]:
        """Return this rank's part of each parameter's gradient, by the optimizer's weights."""
        places = {parameter: buffer for buffer in gradients for parameter in buffer.params}
        shards = {}
        for one in parts_of(self._optimizer):
            for parameter, weights in _weights(one):
                if parameter in places:
                    start = places[parameter].param_index_map[parameter][0]
                    own = one._get_model_param_range_map(parameter)["param"]
                    whole = gradients[places[parameter]]
                    shards[weights] = whole[start + own.start : start + own.end]
        return shards

    def _take_home(self, chunk: Any, norms: Sequence[Tensor]) -> Tensor:
        """Queue the copy of ``norms`` into memory of the host."""
        if chunk not in self._homes or len(self._homes[chunk]) != len(norms):
            self._homes[chunk] = torch.empty(
                len(norms), dtype=torch.float32, device="cpu", pin_memory=device.has_gpu()
            )
        home = self._homes[chunk]
        if norms:
            home.copy_(torch.stack([norm.float() for norm in norms]), non_blocking=True)
        return home


def _weights(optimizer: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each parameter of Megatron's distributed ``optimizer`` with the weights it steps.

    A precision-aware optimizer holds them itself; its parameters are left out.
    """
    for groups, shards in (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    ):
        for of_group, weights in zip(groups, shards, strict=True):
            pairs = zip(of_group, weights, strict=True)
            yield from (pair for pair in pairs if pair[1] is not None)


def _checks(buckets: Any) -> tuple[bool, bool]:
    config = buckets.ddp_config
    return config.check_for_nan_in_grad, config.check_for_large_grads


@contextlib.contextmanager
def _reading(buckets: Any, gradients: Sequence[Tensor]) -> Iterator[None]:
    """Let a group of ``buckets`` find their gradients elsewhere."""
    homes = [bucket.grad_data for bucket in buckets.buckets]
    parts = buckets.cached_grad_buffer_shard_list
    buckets.cached_grad_buffer_shard_list = [None] * len(homes)
    _place(buckets, gradients)
    try:
        yield
    finally:
        _place(buckets, homes)
        buckets.cached_grad_buffer_shard_list = parts


def _place(buckets: Any, gradients: Sequence[Tensor]) -> None:
    for bucket, of_bucket in zip(buckets.buckets, gradients, strict=True):
        bucket.grad_data = of_bucket


@contextlib.contextmanager
def _unchecked(buckets: Any) -> Iterator[None]:
    """Leave out Megatron's checks, for whose answers the host would wait."""
    config = buckets.ddp_config
    buckets.ddp_config = copy.copy(config)
    buckets.ddp_config.check_for_nan_in_grad = False
    buckets.ddp_config.check_for_large_grads = False
    try:
        yield
    finally:
        buckets.ddp_config = config
