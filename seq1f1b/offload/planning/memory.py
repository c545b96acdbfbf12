"""What a GPU holds: slots of model chunks, or everything, and the tensors of a step; in bytes."""

from seq1f1b.offload.planning.shape import Shape
from seq1f1b.planner.memory.closed_form import moving_bytes
from seq1f1b.planner.memory.parameters import chunk_parameters, gradient_bytes, static_sizes
from seq1f1b.planner.memory.stage import trace_stage
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.schedule import Schedule


def slot_sizes(setting: Setting, stage: int, num_slots: int) -> list[float]:
    """Return the bytes of each slot's weights and gradients on one rank of ``stage``."""
    count = slot_parameters(setting, stage)
    return [count * setting.element_bytes, count * gradient_bytes(setting)] * num_slots


def slot_parameters(setting: Setting, stage: int) -> float:
    """Return for how many parameters a slot has room: those of the stage's largest chunk.

    Experts that are dealt to other ranks than the rest of the weights have flat buffers of their
    own, for the largest of which a slot has room too. Megatron's tensor_parallel/layers.py,
    ``use_expert_pgs``, tells when.
    """
    held = [chunk_parameters(setting, chunk) for chunk in setting.chunks[stage]]
    if setting.experts == 1 and setting.expert_tensor == setting.tensor:
        return max(chunk.dense + chunk.experts for chunk in held)
    return max(chunk.dense for chunk in held) + max(chunk.experts for chunk in held)


def traced_bytes(
    setting: Setting, runtime: Runtime, schedule: Schedule, *, num_slots: int | None = None
) -> float:
    """Return bytes that the allocator of the fullest GPU reserves in a step of ``schedule``.

    Every tensor is followed, as ``seq1f1b memory`` does. With ``num_slots`` the weights and
    gradients of a stage take that many slots and its optimizer lives on the host; without, all of
    them stay on the GPU.
    """
    return max(
        trace_stage(
            setting,
            runtime,
            stage,
            actions,
            num_steps=1,
            static=(
                static_sizes(setting, stage)
                if num_slots is None
                else slot_sizes(setting, stage, num_slots)
            ),
        ).reserved
        for stage, actions in enumerate(schedule.stages)
    )


def estimated_bytes(setting: Setting, runtime: Runtime, shape: Shape) -> float:
    """Return about what ``traced_bytes`` returns with slots, at once, to prune a search."""
    num_stages = setting.num_stages
    tokens = setting.seq_length * setting.micro_batch_size
    units = shape.num_micro_batches * shape.num_splits
    turn = shape.turn(num_stages)
    held = 0.0
    for stage in range(num_stages):
        warmup = (shape.num_chunks - 1) * turn + shape.num_splits + 2 * (num_stages - stage - 1)
        live = min(units * shape.num_chunks, warmup) / shape.num_chunks
        moving = moving_bytes(setting, runtime, stage, live * tokens / shape.num_splits)
        held = max(held, sum(slot_sizes(setting, stage, shape.num_slots)) + moving)
    return held
