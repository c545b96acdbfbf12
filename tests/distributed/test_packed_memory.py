"""The KV carry of packed documents to the byte, and boundaries that all ranks agree upon."""

from itertools import pairwise

import pytest
import torch

from tests.distributed.megatron_model import (
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    Case,
    micro_batches,
    settings_of,
    worst_gradient_error,
)
from tests.distributed.packed_data import packed

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

FLOAT32 = 4


def bounds_of(row):
    return row.unique().tolist()


def carried_tokens(case, stage):
    """Follow this stage's actions and return the most tokens that are carried at a time.

    A document that a cut runs through is there from its first piece's forward on, whole; from its
    last piece's backward on, so are gradients of what lies before that piece; all of a micro-batch
    goes after the backward of its first sub-sequence.
    """
    from seq1f1b.sequence import Documents

    settings = settings_of(case)
    pieces = []
    for batch in micro_batches(case):
        rows = [bounds_of(row) for row in batch["cu_seqlens"]]
        parts = settings.cut(case.length, [Documents(tuple(r[:-1]), case.length) for r in rows])
        starts = [part.start for part in parts]
        cut = [
            (start, stop, [at for at in starts if start < at < stop])
            for row in rows
            for start, stop in pairwise(row)
        ]
        part_of = [part.index for part in parts for _ in range(part.length)]
        pieces.append(
            [(part_of[a], part_of[b - 1], b - a, max(inside) - a) for a, b, inside in cut if inside]
        )
    schedule = settings.schedule(case.num_stages, 1, case.num_micro_batches, trains=True)
    live = dict.fromkeys(range(case.num_micro_batches), 0)
    peak = 0
    for action in schedule.stages[stage]:
        k, j = action.micro_batch, action.sub_sequence
        for first, last, length, prefix in pieces[k]:
            if str(action).startswith("0F") and first == j:
                live[k] += length
            if str(action)[1] in "BI" and last == j:
                live[k] += prefix
        peak = max(peak, sum(live.values()))
        if str(action)[1] in "BI" and j == 0:
            live[k] = 0
    return peak


def peak_bytes(case):
    """Return this stage's peak, what was computed for it, and what remains after the step."""
    from megatron.adaptor import install

    carries = install().context.carries
    held = carries.bytes_held
    error = worst_gradient_error(case)
    stage = torch.distributed.get_rank()
    token = 2 * GROUPS * (HIDDEN // HEADS) * FLOAT32 * (LAYERS // case.num_stages)
    left = carries.bytes_in_use, carries.bytes_held - held
    return error, carries.peak_bytes, carried_tokens(case, stage) * token, left


@pytest.mark.parametrize("kind", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_the_carry_is_what_was_computed(workers, num_stages, kind):
    case = Case(num_stages, 6, 3, kind=kind, length=60, documents="cu_seqlens")
    for error, peak, expected, left in workers(num_stages).run(peak_bytes, case):
        assert error < 1e-5
        assert peak == expected > 0
        assert left == (0, 0)


def agree(total, num_rows, num_micro_batches):
    """Return what this rank knows of the documents; only ranks that read data have any."""
    from megatron.adaptor import install

    install()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron.adaptor.step.batch_feed import BatchFeed
    from megatron.adaptor.step.read_ahead import Packing, agree_on_documents

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(2, 2, create_gloo_process_groups=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    generator = torch.Generator().manual_seed(5)
    plain = {"tokens": torch.ones(num_rows, total, dtype=torch.long)}
    batches = [packed(plain, "cu_seqlens", generator)[0] for _ in range(num_micro_batches)]
    reads = groups.tp.rank() == 0 and groups.pp.rank() == 0
    documents = agree_on_documents(
        Packing("--some-flag", "cu_seqlens"),
        BatchFeed(iter(batches)) if reads else None,
        groups,
        num_micro_batches=num_micro_batches,
        num_rows=num_rows,
        total=total,
    )
    parallel_state.destroy_model_parallel()
    expected = [[bounds_of(row) for row in batch["cu_seqlens"]] for batch in batches]
    return [[[*d.starts, d.total] for d in rows] for rows in documents], expected


def test_tensor_parallel_ranks_and_later_stages_know_the_documents(workers):
    for got, expected in workers(4).run(agree, 37, 2, 3):
        assert got == expected
