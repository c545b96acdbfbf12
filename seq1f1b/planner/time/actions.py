"""Seconds of every action of a schedule, per stage and model chunk."""

import operator
from collections.abc import Callable

from seq1f1b.planner.layout import ChunkLayers
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time.kernels import Kernels
from seq1f1b.planner.time.layer import LayerTimes, Times
from seq1f1b.schedule import Kind
from seq1f1b.simulate import Costs, Link
from seq1f1b.simulate.costs import Part

_MICRO = 1e-6


def action_costs(setting: Setting, kernels: Kernels, runtime: Runtime) -> Costs:
    """Return F, B, I and W of every stage, chunk and sub-sequence.

    An action takes as long as its kernels or as the host needs to launch them, whichever is longer,
    and the host's time between two actions.
    """
    times = LayerTimes(setting, kernels, runtime)
    cache: dict[tuple[ChunkLayers, int], dict[Kind, float]] = {}
    stages = []
    for chunks in setting.chunks:
        costs: dict[Part, float] = {}
        for number, chunk in enumerate(chunks):
            for part in range(setting.num_splits):
                if (chunk, part) not in cache:
                    cache[chunk, part] = _of_chunk(setting, kernels, runtime, times, chunk, part)
                for kind, seconds in cache[chunk, part].items():
                    costs[kind, number, part] = seconds
        stages.append(costs)
    return Costs(tuple(stages))


def _of_chunk(
    setting: Setting,
    kernels: Kernels,
    runtime: Runtime,
    times: LayerTimes,
    chunk: ChunkLayers,
    part: int,
) -> dict[Kind, float]:
    whole, anew = Times(), 0.0
    for index, experts in enumerate(chunk.layers):
        layer = times.layer(part, experts=experts)
        whole += layer
        if setting.recompute.is_full(index):
            anew += layer.forward
    if chunk.embedding:
        whole += times.embedding(part)
    if chunk.head:
        whole += times.head(part)
    for _ in range(chunk.mtp):
        whole += times.ahead(part, experts=setting.model.expert_layers[-1])
    host = whole.operations * kernels.gpu.host_us.value * _MICRO
    between = kernels.gpu.action_us.value * _MICRO
    if setting.num_splits > 1 and setting.num_chunks > 1:
        between += runtime.action_seconds
    both = whole.backward + anew + whole.weights
    # a host that computes launches nothing meanwhile
    together: Callable[[float, float], float] = operator.add if runtime.host else max
    return {
        Kind.F: together(whole.forward, host) + between,
        Kind.B: together(both, host) + between,
        Kind.I: together(whole.backward + anew, host) + between,
        Kind.W: together(whole.weights, host / 2) + between,
    }


def stage_link(setting: Setting, kernels: Kernels) -> Link:
    """Return what carries a sub-sequence's tensor from a stage to the next.

    Megatron places stages outermost, so where a step takes several nodes a stage's neighbour is on
    another node.
    """
    shards = setting.tensor if setting.sequence_parallel else 1
    token = setting.model.hidden * setting.element_bytes / shards
    return Link(
        latency=kernels.latency,
        bandwidth=kernels.bandwidth(setting.num_gpus <= kernels.gpus_per_node),
        tensor_bytes=tuple(setting.tokens(part) * token for part in range(setting.num_splits)),
    )
