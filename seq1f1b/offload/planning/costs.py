"""What a setting's actions take, what its chunks weigh, and what moves: seconds and bytes."""

from seq1f1b.offload.planning.machine import Machine
from seq1f1b.offload.planning.simulation import Bytes
from seq1f1b.planner.chunks import chunk_bytes, chunk_operations, parameters
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.layout import ChunkLayers
from seq1f1b.planner.memory.parameters import gradient_bytes
from seq1f1b.planner.setting import Setting
from seq1f1b.schedule import Kind
from seq1f1b.sequence import TokenCost
from seq1f1b.simulate import Costs, Link
from seq1f1b.simulate.costs import Part

_WITHOUT_PRODUCTS = frozenset({"layernorm", "moe_act"})
"""Modules whose recomputation takes next to no time: they have no matrix products."""


def action_costs(setting: Setting, flops: float) -> Costs:
    """Return seconds of every F and B at ``flops`` operations per second.

    A forward does the operations of its matrix products and attention, a backward twice as many,
    and what is recomputed once more: layers, or their attention, and the output layer if so.

    Raises SettingError for modules to recompute that are not counted.
    """
    stages = []
    for chunks, operations in zip(setting.chunks, chunk_operations(setting), strict=True):
        times: dict[Part, float] = {}
        for number, (chunk, cost) in enumerate(zip(chunks, operations, strict=True)):
            again = _recomputed(setting, chunk)
            for part in setting.parts:
                rows = setting.micro_batch_size
                forward = rows * cost.of(part.start, part.stop) / flops
                anew = rows * again.of(part.start, part.stop) / flops
                times[Kind.F, number, part.index] = forward
                times[Kind.B, number, part.index] = 2 * forward + anew
        stages.append(times)
    return Costs(tuple(stages))


def layer_and_head(setting: Setting) -> tuple[float, float]:
    """Return the operations of a layer and of the output layer on a sequence, all passes."""
    model = setting.model
    body, whole = model.token_cost(0), model.token_cost(setting.vocabulary)
    recomputed = setting.recompute.granularity == "full"
    layer = body.of(0, setting.seq_length) / model.num_layers * (4 if recomputed else 3)
    passes = 4 if setting.recompute.loss else 3
    return layer, passes * (whole.linear - body.linear) * setting.seq_length


def _recomputed(setting: Setting, chunk: ChunkLayers) -> TokenCost:
    cost = _recomputed_layers(setting, chunk)
    if not (setting.recompute.loss and chunk.head):
        return cost
    whole = setting.model.token_cost(setting.vocabulary)
    head = whole.linear - setting.model.token_cost(0).linear
    return TokenCost(cost.linear + head, cost.attention)


def _recomputed_layers(setting: Setting, chunk: ChunkLayers) -> TokenCost:
    recompute, num_layers = setting.recompute, setting.model.num_layers
    body = setting.model.token_cost(0)
    if recompute.granularity == "full":
        share = sum(map(recompute.is_full, range(len(chunk.layers)))) / num_layers
        return TokenCost(body.linear * share, body.attention * share)
    if recompute.granularity is None:
        return TokenCost(0.0, 0.0)
    unknown = recompute.modules - _WITHOUT_PRODUCTS - {"core_attn"}
    if unknown:
        raise SettingError(
            [f"--recompute-modules {' '.join(sorted(unknown))}: core_attn and full are modelled"]
        )
    share = len(chunk.layers) / num_layers if "core_attn" in recompute.modules else 0.0
    return TokenCost(0.0, body.attention * share)


def stage_link(setting: Setting, machine: Machine) -> Link:
    """Return what carries the hidden states of a micro-batch's sub-sequences between stages."""
    width = setting.model.hidden * setting.element_bytes
    sizes = tuple(float(setting.tokens(part) * width) for part in range(setting.num_splits))
    return Link(0.0, machine.stages, sizes)


def total_parameters(setting: Setting) -> float:
    """Return the parameters of all chunks; tied embeddings count on both stages that have them."""
    return sum(map(sum, parameters(setting)))


def adam_bytes(setting: Setting) -> int:
    """Return the bytes of memory traffic that updating a parameter takes.

    fp32 weight and both moments read and written, 24; the weight written in the model's precision;
    the gradient read and set to zero: 30 with gradients in bf16.
    """
    narrow = setting.element_bytes if setting.element_bytes < 4 else 0
    return 24 + narrow + 2 * gradient_bytes(setting)


def moved(setting: Setting, machine: Machine) -> Bytes:
    """Return what moves when chunks visit the device, and how long the host updates each."""
    traffic = adam_bytes(setting) / machine.host
    adam = tuple(tuple(count * traffic for count in stage) for stage in parameters(setting))
    return Bytes(*chunk_bytes(setting), adam)


def gpu_adam_seconds(setting: Setting, machine: Machine) -> float:
    """Return how long the stage with most parameters takes to update them on its GPU."""
    return max(map(sum, parameters(setting))) * adam_bytes(setting) / machine.gpu_memory


def host_bytes(setting: Setting, machine: Machine) -> float:
    """Return pinned and other memory of the host: weights, gradients, and Adam's fp32 states.

    Those are weights, both moments, and a copy of the gradients where the machine makes one.
    """
    return total_parameters(setting) * (resident_bytes(setting) + machine.gradient_copy)


def resident_bytes(setting: Setting) -> int:
    """Return the bytes of a parameter: weight, gradient, both moments, and the fp32 weight if the
    model's is shorter.
    """
    states = 12 if setting.element_bytes < 4 else 8
    return setting.element_bytes + gradient_bytes(setting) + states
