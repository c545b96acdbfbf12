"""What every model chunk computes and keeps, without a device: operations and bytes."""

from seq1f1b.planner.memory.attention import Carry
from seq1f1b.planner.memory.layer import Layer
from seq1f1b.planner.memory.parameters import chunk_parameters, gradient_bytes
from seq1f1b.planner.memory.sizes import Sizes
from seq1f1b.planner.memory.tape import Saved, Tape
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.sequence import TokenCost
from seq1f1b.simulate import Memory
from seq1f1b.simulate.memory import ByChunk


def chunk_operations(setting: Setting) -> tuple[tuple[TokenCost, ...], ...]:
    """Return for each stage the operations of a token in each of its chunks, on all their ranks.

    A layer costs the mean of all layers; the last chunk has the output layer.
    """
    model = setting.model
    body, whole = model.token_cost(0), model.token_cost(setting.vocabulary)
    head = whole.linear - body.linear
    linear, pairs = body.linear / model.num_layers, body.attention / model.num_layers

    def of(layers: int, mtp: int, has_head: bool) -> TokenCost:
        number = layers + mtp
        heads = (mtp + 1) if has_head else mtp
        return TokenCost(linear * number + head * heads, pairs * number)

    return tuple(
        tuple(of(len(chunk.layers), chunk.mtp, chunk.head) for chunk in chunks)
        for chunks in setting.chunks
    )


def parameters(setting: Setting) -> tuple[tuple[float, ...], ...]:
    """Return for each stage the parameters of its chunks on one rank."""
    return tuple(
        tuple(
            held.dense + held.experts
            for held in (chunk_parameters(setting, chunk) for chunk in chunks)
        )
        for chunks in setting.chunks
    )


def chunk_bytes(
    setting: Setting,
) -> tuple[tuple[tuple[float, ...], ...], tuple[tuple[float, ...], ...]]:
    """Return for each stage the bytes of its chunks' weights on one rank, and of gradients."""
    counts = parameters(setting)

    def times(size: int) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(count * size for count in stage) for stage in counts)

    return times(setting.element_bytes), times(gradient_bytes(setting))


def chunk_memory(setting: Setting, runtime: Runtime) -> ByChunk:
    """Return for each stage what each of its chunks keeps of a micro-batch, in bytes of one rank.

    Activations that wait for their backward, the KV carry and its gradient accumulators; weights,
    optimizer states and temporaries are left out.
    """
    kinds = {experts: _kept(setting, runtime, experts) for experts in set(_kinds(setting))}
    whole = Sizes(setting, sum(setting.tokens(part) for part in range(setting.num_splits)))
    before = Sizes(setting, whole.tokens - setting.tokens(setting.num_splits - 1))
    wider = max(4, setting.element_bytes) / setting.element_bytes
    has_carry = setting.num_splits > 1
    stages = []
    for chunks in setting.chunks:
        memories = []
        for chunk in chunks:
            layers = [*chunk.layers, *([setting.model.expert_layers[-1]] * chunk.mtp)]
            kept = [sum(kinds[experts][part] for experts in layers) for part in _parts(setting)]
            if chunk.head:
                for part in _parts(setting):
                    sizes = Sizes(setting, setting.tokens(part))
                    kept[part] += (1 + chunk.mtp) * sizes.loss_logits + 2 * sizes.residual
            memories.append(
                Memory(
                    activation=tuple(kept),
                    carry=len(layers) * (whole.key + whole.value) * has_carry,
                    accumulator=len(layers) * (before.key + before.value) * wider * has_carry,
                )
            )
        stages.append(tuple(memories))
    return tuple(stages)


def _parts(setting: Setting) -> range:
    return range(setting.num_splits)


def _kinds(setting: Setting) -> list[bool]:
    return [experts for chunks in setting.chunks for chunk in chunks for experts in chunk.layers]


def _kept(setting: Setting, runtime: Runtime, experts: bool) -> list[float]:
    """Return what one layer keeps of each sub-sequence."""
    kept = []
    for part in _parts(setting):
        sizes, tape = Sizes(setting, setting.tokens(part)), Tape(runtime)
        layer, saved, carry = Layer(setting, tape), Saved(tape), Carry()
        if setting.recompute.granularity == "full":
            kept.append(sizes.residual)
            continue
        layer.forward(saved, sizes, carry, part, experts=experts)
        in_carry = sum(size for size, _ in carry.buffers)
        kept.append(tape.kept - in_carry + sizes.residual)
    return kept
