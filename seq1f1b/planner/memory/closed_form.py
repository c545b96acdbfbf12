"""The fullest moment of every stage in closed form: quick, and good enough to prune a search."""

from dataclasses import replace
from functools import lru_cache

from seq1f1b.planner.layout import ChunkLayers
from seq1f1b.planner.memory.allocator import GIB
from seq1f1b.planner.memory.attention import Carry
from seq1f1b.planner.memory.layer import Layer
from seq1f1b.planner.memory.parameters import static_sizes
from seq1f1b.planner.memory.sizes import Sizes
from seq1f1b.planner.memory.tape import Saved, Tape
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.simulate.formulas import live_micro_batches

_UNEQUAL_PARTS = 1.15
"""What sub-sequences of unequal lengths cost in fragments, on what is not static."""


def estimate_stages(setting: Setting, runtime: Runtime) -> tuple[float, ...]:
    """Return GiB reserved by every stage at most.

    Parameters and optimizer; what a layer keeps per token, times the tokens that the schedule keeps
    alive; keys, values and their gradient accumulators; the largest passing tensors.
    """
    return tuple(_stage(setting, runtime, stage) / GIB for stage in range(setting.num_stages))


def estimate_peak(setting: Setting, runtime: Runtime) -> float:
    """Return GiB reserved by the fullest stage.

    Of stages with the same layers the first holds most, so only that one is looked at.
    """
    first: dict[tuple[ChunkLayers, ...], int] = {}
    for stage, chunks in enumerate(setting.chunks):
        first.setdefault(chunks, stage)
    return max(_stage(setting, runtime, stage) for stage in first.values()) / GIB


def _stage(setting: Setting, runtime: Runtime, stage: int) -> float:
    static = sum(static_sizes(setting, stage))
    return static + moving_bytes(setting, runtime, stage, _live_tokens(setting, stage))


def moving_bytes(setting: Setting, runtime: Runtime, stage: int, live: float) -> float:
    """Return bytes reserved by a stage for what is not there all the time.

    live: tokens that it holds on one chunk, on average over its chunks.
    """
    chunks, num_chunks = setting.chunks[stage], setting.num_chunks
    layers = [experts for chunk in chunks for experts in chunk.layers]
    per_token = {kind: _kept_per_token(setting, runtime, kind) for kind in set(layers)}
    kept = live * sum(per_token[experts] for experts in layers)
    whole = Sizes(setting, sum(setting.tokens(part) for part in range(setting.num_splits)))
    carried = 0.0
    if setting.num_splits > 1:
        buffers = whole.key + whole.value
        micro_batches = -(-live // max(1, whole.tokens)) * num_chunks
        carried = buffers * len(layers) / num_chunks * micro_batches
        wider = max(4, setting.element_bytes) / setting.element_bytes
        carried += buffers * len(layers) / num_chunks * wider
    largest = Sizes(setting, max(setting.tokens(part) for part in range(setting.num_splits)))
    passing = 3 * largest.full + largest.projected + largest.activated
    if runtime.collective_buffers != "never" and setting.tensor > 1:
        passing += 2 * largest.full * len(layers) / num_chunks
    if any(chunk.head for chunk in chunks):
        passing += largest.logits + largest.loss_logits
        if not setting.recompute.loss:
            kept += whole.loss_logits - largest.loss_logits
    moving = kept + carried + passing
    return moving * (_UNEQUAL_PARTS if setting.num_splits > 1 else 1.0)


def _live_tokens(setting: Setting, stage: int) -> float:
    """Return tokens that a stage holds on one chunk, on average over its chunks."""
    tokens = sum(setting.tokens(part) for part in range(setting.num_splits))
    if setting.schedule_name == "gpipe":
        return float(tokens * setting.num_micro_batches)
    at = 0 if setting.schedule_name.is_zero_bubble else stage
    return tokens * live_micro_batches(
        setting.num_stages,
        setting.num_micro_batches,
        setting.num_splits,
        at,
        num_chunks=setting.num_chunks,
    )


def _kept_per_token(setting: Setting, runtime: Runtime, experts: bool) -> float:
    """Return the bytes that a layer keeps of one token."""
    splits = min(2, setting.num_splits)
    alike = replace(
        setting,
        chunks=((ChunkLayers(()),),),
        num_micro_batches=1,
        num_splits=splits,
        cuts=(1,) * splits,
        data=1,
        assumed=(),
    )
    return _traced_per_token(alike, runtime, experts)


@lru_cache(maxsize=1024)
def _traced_per_token(setting: Setting, runtime: Runtime, experts: bool) -> float:
    """Trace one layer; all settings whose layers keep the same share the result."""
    sizes = Sizes(setting, 4096 * setting.tensor)
    if setting.recompute.granularity == "full":
        return sizes.residual / sizes.tokens
    tape = Tape(runtime)
    layer, saved, carry = Layer(setting, tape), Saved(tape), Carry()
    layer.forward(saved, sizes, carry, 0, experts=experts)
    in_carry = sum(size for size, _ in carry.buffers)
    return (tape.kept - in_carry + sizes.residual) / sizes.tokens
