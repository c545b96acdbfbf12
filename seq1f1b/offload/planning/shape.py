"""From a model and a number of GPUs to settings whose model chunks visit them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from seq1f1b.offload.planning.costs import layer_and_head
from seq1f1b.planner.balance import deal_layers
from seq1f1b.planner.catalogue import by_shape
from seq1f1b.planner.layout import deal, write_layout
from seq1f1b.planner.setting import Setting
from seq1f1b.schedule import Schedule, interleaved, lower, visiting


@dataclass(frozen=True)
class Shape:
    """v, k, T, s and m of a step.

    Model chunks of a stage, slots for them on its GPU, turns, sub-sequences of a micro-batch, and
    micro-batches.
    """

    num_chunks: int
    num_slots: int
    num_turns: int
    num_splits: int
    num_micro_batches: int

    def turn(self, num_stages: int) -> int:
        """Return the sub-sequences of a turn, as --seq1f1b-turn counts them."""
        units = self.num_micro_batches * self.num_splits
        return max(num_stages, -(-units // self.num_turns))

    def schedule(self, num_stages: int, *, prefetch: bool = True) -> Schedule:
        """Return the schedule that training with --offload-model-chunks runs.

        Raises ValueError for more slots than chunks, and for several chunks on one stage.
        """
        return _schedule(self, num_stages, prefetch)

    def bare(self, num_stages: int) -> Schedule:
        """Return the same order of computations with all chunks on the device."""
        turn = self.turn(num_stages) if self.num_chunks > 1 else None
        return interleaved(
            num_stages, self.num_chunks, self.num_micro_batches, self.num_splits, turn
        )


@lru_cache(maxsize=128)
def _schedule(shape: Shape, num_stages: int, prefetch: bool) -> Schedule:
    return visiting(lower(shape.bare(num_stages)), shape.num_slots, prefetch=prefetch)


def arrange(
    base: Setting, num_stages: int, shape: Shape, rows: int, layout: str | None = None
) -> Setting:
    """Return ``base``, a setting of the model on one stage, on ``num_stages`` in ``shape``.

    rows: sequences of a step. layout: Megatron's notation; without one, layers are dealt evenly.
    Raises LayoutError where they cannot be.
    """
    several = shape.num_chunks > 1
    arguments = replace(
        base.arguments,
        pipeline_model_parallel_size=num_stages,
        num_virtual_stages_per_pipeline_rank=shape.num_chunks if several and not layout else None,
        pipeline_model_parallel_layout=layout,
        micro_batch_size=rows // shape.num_micro_batches,
        global_batch_size=rows,
        seq1f1b_splits=shape.num_splits,
        use_distributed_optimizer=True,
    )
    return replace(
        base,
        arguments=arguments,
        chunks=deal(arguments, base.model.expert_layers, num_stages, shape.num_chunks),
        micro_batch_size=rows // shape.num_micro_batches,
        num_micro_batches=shape.num_micro_batches,
        num_splits=shape.num_splits,
        schedule_name=by_shape(shape.num_chunks, shape.num_splits),
        cuts=None,
    )


def layouts(base: Setting, num_stages: int, num_chunks: int) -> Iterator[str | None]:
    """Yield ways to deal layers: evenly where that goes, and balanced for the output layer.

    Balanced twice: chunk by chunk, and stage by stage, each stage then dealing its own evenly.
    Every chunk has a layer; there is no way if there are fewer layers than chunks.
    """
    num_layers, num_parts = base.model.num_layers, num_stages * num_chunks
    if num_layers < num_parts:
        return
    found: list[Sequence[int]] = []
    if num_layers % num_parts == 0:
        found.append([num_layers // num_parts] * num_parts)
        yield None
    layer, head = layer_and_head(base)
    by_chunk = deal_layers(num_layers, num_parts, layer, 0.0, head)
    by_stage = [0] * num_parts
    for stage, count in enumerate(deal_layers(num_layers, num_stages, layer, 0.0, head)):
        end = head if stage == num_stages - 1 else 0.0
        by_stage[stage::num_stages] = deal_layers(count, num_chunks, layer, 0.0, end)
    for counts in (_with_a_layer(by_chunk), _with_a_layer(by_stage)):
        if counts not in found:
            found.append(counts)
            yield write_layout(counts, base.model.mtp)


def _with_a_layer(counts: Sequence[int]) -> list[int]:
    """Return layers of chunks, of which those without any took one from the largest."""
    dealt = list(counts)
    while 0 in dealt:
        dealt[dealt.index(max(dealt))] -= 1
        dealt[dealt.index(0)] += 1
    return dealt


def batches(rows: int) -> list[int]:
    """Return the numbers of equal micro-batches that ``rows`` sequences can be dealt to."""
    low = [number for number in range(1, math.isqrt(rows) + 1) if rows % number == 0]
    return sorted({*low, *(rows // number for number in low)})
