"""How many layers each model chunk gets, so that embedding and output layer cost no extra time."""

from collections.abc import Callable
from functools import partial
from heapq import heapify, heapreplace

from seq1f1b.planner.layout import write_layout
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time import Kernels
from seq1f1b.planner.time.layer import LayerTimes, Times


def balanced_counts(setting: Setting, kernels: Kernels, runtime: Runtime) -> list[int]:
    """Return the layers of every model chunk, in the order of the model.

    The first chunk has the embedding, the last the output layer and multi-token prediction. Layers
    go one by one to the chunk that has least to compute, which makes the largest chunk as small as
    it can be; of equal ones the later chunk comes first, since it holds fewer micro-batches.
    """
    times = LayerTimes(setting, kernels, runtime)
    pattern, mtp = setting.model.expert_layers, setting.model.mtp

    def total(of_part: Callable[[int], Times]) -> float:
        each = [of_part(part) for part in range(setting.num_splits)]
        return sum(one.forward + one.backward + one.weights for one in each)

    of_kind = {experts: total(partial(times.layer, experts=experts)) for experts in set(pattern)}
    end = total(times.head)
    if mtp:
        end += mtp * total(partial(times.ahead, experts=pattern[-1]))
    return deal_layers(
        len(pattern),
        setting.num_stages * setting.num_chunks,
        sum(of_kind[experts] for experts in pattern) / len(pattern),
        total(times.embedding),
        end,
    )


def deal_layers(
    num_layers: int, num_parts: int, layer: float, start: float, end: float
) -> list[int]:
    """Deal layers of ``layer`` seconds to parts; the first and the last have more to do."""
    counts = [0] * num_parts
    heap = [(0.0, -part) for part in range(num_parts)]
    heap[0] = (start, 0)
    heap[-1] = (heap[-1][0] + end if num_parts > 1 else start + end, 1 - num_parts)
    heapify(heap)
    for _ in range(num_layers):
        cost, negative = heap[0]
        counts[-negative] += 1
        heapreplace(heap, (cost + layer, negative))
    return counts


def balanced_layout(setting: Setting, kernels: Kernels, runtime: Runtime) -> str | None:
    """Return --pipeline-model-parallel-layout for balanced chunks; None where layers are even."""
    counts = balanced_counts(setting, kernels, runtime)
    even = setting.model.num_layers / len(counts)
    if all(count == even for count in counts):
        return None
    return write_layout(counts, setting.model.mtp)
