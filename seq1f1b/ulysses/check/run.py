"""Check a model that a user names: one process against a group of ranks on this machine."""

from collections.abc import Sequence

from seq1f1b.ulysses.check.batches import make_batch
from seq1f1b.ulysses.check.compare import Comparison, compare
from seq1f1b.ulysses.check.source import Source, scales_by_length
from seq1f1b.ulysses.mesh import init_sequence_parallel
from seq1f1b.ulysses.prepare import vocabulary_of
from seq1f1b.ulysses.ranks import run_ranks

LAYOUTS = ("plain", "packed", "padded", "padded-left")


def check(
    source: Source,
    size: int,
    *,
    layouts: Sequence[str] = LAYOUTS,
    num_rows: int = 2,
    length: int = 48,
) -> list[Comparison]:
    """Return one comparison for each layout, of ``num_rows`` rows of ``length`` tokens.

    Raises UnsupportedModelError when the model is refused, and ValueError for an unknown source.
    """
    return run_ranks(check_rank, size, source, size, tuple(layouts), num_rows, length)


def check_rank(
    source: Source, size: int, layouts: Sequence[str], num_rows: int, length: int
) -> list[Comparison]:
    """Do one rank's part of ``check``; results are on rank 0."""
    import transformers

    transformers.logging.set_verbosity_error()
    init_sequence_parallel(size)
    model = source.build()
    vocabulary = vocabulary_of(model)
    batches = [
        (layout, make_batch(layout, vocabulary, num_rows=num_rows, length=length))
        for layout in layouts
    ]
    as_one_row = scales_by_length(model.config)
    return compare(source.build, batches, size, packed_as_one_row=as_one_row)
