"""What every stage holds in memory while a schedule runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from seq1f1b.schedule import Action, Kind, Schedule
from seq1f1b.sequence import sub_sequences
from seq1f1b.simulate.simulator import Simulation


@dataclass(frozen=True)
class Memory:
    """What one model chunk of a stage holds for one micro-batch, in bytes or another unit.

    activation: of each sub-sequence, from its F to the end of its B, or of its W where the
    backward is split. carry: keys and values of the whole sequence, from the first sub-sequence's
    F to the end of its B. accumulator: gradients of keys and values before the last sub-sequence,
    from that one's B to the end of the first's.

    weights, gradients: of the chunk itself, for the whole step. Where chunks visit the device, its
    slots are what they take: as many as the schedule has, each with the most room that one of the
    stage's chunks needs, whether a chunk is in it or not.
    """

    activation: tuple[float, ...]
    carry: float = 0.0
    accumulator: float = 0.0
    weights: float = 0.0
    gradients: float = 0.0

    @classmethod
    def in_micro_batches(cls, schedule: Schedule) -> "Memory":
        """Count in activations of one stage for one whole micro-batch, without the KV carry."""
        share = 1.0 / (schedule.num_chunks * schedule.num_splits)
        return cls((share,) * schedule.num_splits)

    @classmethod
    def of_transformer(
        cls,
        schedule: Schedule,
        lengths: Sequence[int],
        *,
        num_layers: int,
        hidden_size: int,
        kv_size: int | None = None,
        batch_size: int = 1,
        element_bytes: int = 2,
    ) -> "Memory":
        """Estimate bytes for a GPT of ``num_layers`` in all, dealt evenly to all model chunks.

        A layer keeps 34 bytes per token and hidden unit in 16 bits when attention keeps no scores
        (arXiv 2205.05198, section 4.1), in proportion to ``element_bytes``. Keys and values are
        ``kv_size`` wide each (hidden_size unless given); their gradients add up in 32 bits.
        """
        layers = num_layers / (schedule.num_stages * schedule.num_chunks)
        per_token = 17 * element_bytes * hidden_size * layers * batch_size
        kv_elements = 2 * (kv_size or hidden_size) * layers * batch_size
        splits = schedule.num_splits > 1
        last = sub_sequences(lengths)[-1]
        return cls(
            activation=tuple(length * per_token for length in lengths),
            carry=last.total * kv_elements * element_bytes if splits else 0.0,
            accumulator=last.start * kv_elements * max(4, element_bytes),
        )


ByChunk = Sequence[Sequence[Memory]]
"""For each stage the memory of each of its model chunks."""


def memory_over_time(
    simulation: Simulation, memory: Memory | ByChunk
) -> tuple[tuple[tuple[float, float], ...], ...]:
    """Return per stage the moments when memory changes, each with what is held from then on.

    ``memory`` is that of every model chunk, or of each.
    """
    return tuple(
        tuple(_curve(_changes(simulation, stage, memory)))
        for stage in range(simulation.schedule.num_stages)
    )


def peak_memory(simulation: Simulation, memory: Memory | ByChunk) -> tuple[float, ...]:
    """Return the most that every stage holds at once."""
    return tuple(max(held for _, held in curve) for curve in memory_over_time(simulation, memory))


def _changes(
    simulation: Simulation, stage: int, memory: Memory | ByChunk
) -> Iterator[tuple[float, float]]:
    """Yield when memory changes, and by how much."""
    num_chunks = simulation.schedule.num_chunks
    chunks = [memory] * num_chunks if isinstance(memory, Memory) else memory[stage]
    actions = simulation.schedule.stages[stage]
    if constant := _constant(simulation.schedule, chunks):
        yield 0.0, constant
    last = simulation.schedule.num_splits - 1
    trains = any(action.kind in (Kind.B, Kind.I) for action in actions)
    split = {action[1:] for action in actions if action.kind is Kind.W}
    spans = zip(actions, simulation.starts[stage], simulation.ends[stage], strict=True)
    for action, start, end in spans:
        taken, freed = _taken_and_freed(
            action, chunks[action.chunk], last, trains, action[1:] in split
        )
        if taken:
            yield start, taken
        if freed:
            yield end, -freed


def _constant(schedule: Schedule, chunks: Sequence[Memory]) -> float:
    """Return what a stage's weights and gradients take from the step's begin to its end."""
    sizes = [chunk.weights + chunk.gradients for chunk in chunks]
    return sum(sizes) if schedule.num_slots is None else schedule.num_slots * max(sizes)


def _taken_and_freed(
    action: Action, memory: Memory, last: int, trains: bool, split: bool
) -> tuple[float, float]:
    kind, j = action.kind, action.sub_sequence
    taken = freed = 0.0
    if kind is Kind.F:
        taken = memory.activation[j] + (memory.carry if j == 0 else 0.0)
        if not trains:
            freed = memory.activation[j] + (memory.carry if j == last else 0.0)
    elif kind in (Kind.B, Kind.I):
        taken = memory.accumulator if j == last else 0.0
        freed = memory.carry + memory.accumulator if j == 0 else 0.0
    if kind is Kind.W or (kind is Kind.B and not split):
        freed += memory.activation[j]
    return taken, freed


def _curve(changes: Iterator[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Add up the changes, all of one moment together."""
    held = 0.0
    for time, together in groupby(sorted(changes), key=lambda change: change[0]):
        held += sum(change for _, change in together)
        yield time, held
