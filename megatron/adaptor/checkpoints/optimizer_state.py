"""State of Megatron's distributed optimizer, where the buckets of its buffers end in padding.

Megatron pads each bucket to a multiple of 128 elements and of the data-parallel size. Both of its
torch_dist formats mistake places in a buffer for places in state that is stored without the padding
of buckets, if another bucket follows: with overlapped gradient reduction, and with embeddings that
stages share.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

from megatron.adaptor.patches import Patch

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def patches() -> list[Patch]:
    """Return what is replaced in the distributed optimizer."""
    return [
        Patch(f"{_OPTIMIZER}.sharded_param_state_fully_reshardable", fully_reshardable),
        Patch(f"{_OPTIMIZER}.sharded_param_state_dp_reshardable", dp_reshardable),
    ]


def fully_reshardable(
    original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Read each weight's state where it lies; Megatron stores that of others, or zeros."""
    with _without_padding(optimizer.buffers):
        return original(optimizer, *args, **kwargs)


@contextmanager
def _without_padding(buffers: list[Any]) -> Iterator[None]:
    """Count places in the buffers without the padding of buckets inside."""
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        begins = accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
        shifts = [
            begin - bucket.offset for begin, bucket in zip(begins, buffer.buckets, strict=False)
        ]
        buffer.param_index_map = {
            parameter: (start + shifts[index], end + shifts[index], index)
            for parameter, (start, end, index) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


def dp_reshardable(original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """End what fills gaps between weights where a bucket ends, or Megatron cannot save it."""
    from megatron.core.dist_checkpointing import ShardedTensor

    state = original(optimizer, *args, **kwargs)
    for index, _ in enumerate(optimizer.gbuf_ranges):
        for buckets in state[index].values():
            for tensors in (entry for bucket in buckets for entry in bucket):
                for key, tensor in tensors.items():
                    if isinstance(tensor, ShardedTensor):
                        tensors[key] = _within(tensor)
    return state


def _within(tensor: Any) -> Any:
    """Return a sharded tensor of one axis without what lies beyond the whole one."""
    beyond = tensor.global_offset[0] + tensor.local_shape[0] - tensor.global_shape[0]
    if beyond <= 0:
        return tensor
    size = tensor.local_shape[0] - beyond
    return replace(tensor, data=tensor.data[:size], local_shape=(size,))
