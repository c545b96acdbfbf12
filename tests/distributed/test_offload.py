"""Model chunks in host memory train bit for bit as on the device, with freed memory poisoned."""

import math
from dataclasses import replace
from typing import Any

import pytest

from seq1f1b.schedule import num_loads
from tests.distributed.megatron_model import Case
from tests.distributed.offload_cases import Visits, compare
from tests.distributed.training_runs import train

pytestmark = pytest.mark.distributed

V2 = Case(2, 4, 1, num_chunks=2, layers=4, length=16)
V4 = Case(2, 4, 1, num_chunks=4, layers=8, length=16)
V8 = Case(2, 2, 1, num_chunks=8, layers=16, length=16)


def cut(case: Case, **more: Any) -> Case:
    """Return ``case`` in 3 sub-sequences of each of half as many micro-batches."""
    return replace(case, num_splits=3, num_micro_batches=2, **more)


def run(workers: Any, case: Case, common: dict[str, Any], *ways: dict[str, Any]):
    """Return for each rank the resident run and the others."""
    return workers(case.num_ranks).run(compare, case, common, list(ways), timeout=200)


def same(one: Visits, other: Visits) -> bool:
    return (one.weights, one.losses, one.norms) == (other.weights, other.losses, other.norms)


ONE = {"turn": 1000}
# a copy of a chunk takes some milliseconds, beside the computations, and both ranks share the link
PACED = {"pace": 0.05, "roots": (0, 0)}
CASES = [
    ("v2", V2, ONE, [{"slots": 1}, {"slots": 2}, {"slots": 1, "prefetch": True}]),
    ("v4", V4, ONE, [{"slots": k, "prefetch": k == 2} for k in (1, 2, 3)]),
    ("paced", V4, ONE, [PACED | {"slots": 2, "prefetch": early} for early in (True, False)]),
    ("v8", V8, ONE, [{"slots": 2}, {"slots": 3, "prefetch": True}]),
    ("bf16", V4, ONE | {"bf16": True}, [{"slots": 1}, {"slots": 2, "prefetch": True}]),
    ("evaluated", cut(V4), ONE | {"evaluates": True}, [{"slots": 2, "prefetch": True}]),
    ("s3 bf16", cut(V4), ONE | {"bf16": True}, [{"slots": 3}, {"slots": 1}]),
    ("recomputed", cut(V4, recompute=True), ONE, [{"slots": 2, "prefetch": True}, {"slots": 1}]),
    ("tied", cut(V4, tied=True), ONE, [{"slots": 2}]),
    ("per token", cut(V2, per_token=True), ONE, [{"slots": 1, "prefetch": True}]),
    ("packed", cut(V4, documents="cu_seqlens"), ONE, [{"slots": 2, "prefetch": True}]),
    ("experts", cut(V2, experts="aux_loss"), ONE, [{"slots": 1}]),
]


@pytest.mark.parametrize("case, common, ways", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_one_turn_trains_bit_for_bit(workers, case, common, ways):
    for resident, *others in run(workers, case, common, *ways):
        assert len(set(resident.losses)) > 1 or not resident.losses[0]
        for way, offloaded in zip(ways, others, strict=True):
            assert same(resident, offloaded), way
            expected = num_loads(case.num_chunks, way["slots"])
            assert offloaded.loads == [expected] * len(offloaded.loads), way
            assert offloaded.gradients_in == 0
            check_bytes(case, resident, offloaded, way["slots"], common.get("bf16", False))


def check_bytes(case: Case, resident: Visits, offloaded: Visits, slots: int, bf16: bool) -> None:
    """Compare what the copies counted with what the buffers hold: gradients are in float32."""
    gradients = resident.slot_bytes * (4 / 6 if bf16 else 1 / 2)
    assert offloaded.gradients_out == gradients
    whole = resident.slot_bytes - gradients
    largest = offloaded.slot_bytes / slots * ((2 / 6) if bf16 else 1 / 2)
    assert whole <= offloaded.weights_in <= offloaded.loads[0] * largest
    assert offloaded.slot_bytes <= slots * resident.slot_bytes
    if case is V4 and not bf16:
        assert slots < 3 or offloaded.slot_bytes < resident.slot_bytes * 1.3 * slots / 4


@pytest.mark.parametrize(
    "case, turn, ways",
    [
        (V4, 2, [{"slots": 2}, PACED | {"slots": 3, "prefetch": True}, {"slots": 1}]),
        (cut(V4), 3, [{"slots": 2, "prefetch": True}, {"slots": 3}]),
    ],
    ids=["v4", "s3"],
)
def test_several_turns_train_bit_for_bit(workers, case, turn, ways):
    for resident, *others in run(workers, case, {"turn": turn}, *ways):
        for way, offloaded in zip(ways, others, strict=True):
            assert same(resident, offloaded), way
            if way["slots"] > 1:
                expected = num_loads(case.num_chunks, way["slots"], 2)
                assert all(expected <= number <= expected + 2 for number in offloaded.loads)
                assert offloaded.gradients_in > 0


def test_a_chunk_that_comes_back_to_another_slot_trains_wrongly(workers):
    """Saved tensors point to the old place: without this, the comparisons would prove nothing."""
    ways = [{"slots": 2}, {"slots": 2, "moves": True}]
    ranks = run(workers, V4, ONE | {"steps": 2}, *ways)
    assert all(same(resident, right) for resident, right, _ in ranks)
    assert not any(same(resident, moved) for resident, _, moved in ranks)
    assert any(math.isnan(loss) for _, _, moved in ranks for loss in moved.losses) or all(
        resident.weights != moved.weights for resident, _, moved in ranks
    )


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_script_trains_evaluates_and_resumes_with_chunks_in_host_memory(tmp_path):
    """The same losses as with all chunks on the device, one of them after a resumption."""
    flags = (
        *("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2),
        *("--use-distributed-optimizer", "--seq1f1b-splits", 2),
    )
    offload = ("--offload-model-chunks", 1, "--offload-prefetch")
    resident = train(tmp_path, 2, *flags, "--seq1f1b-turn", 6)
    kept = ("--save", tmp_path / "kept", "--save-interval", 2)
    offloaded = train(tmp_path, 2, *flags, *offload, *kept)
    (tmp_path / "kept" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = train(tmp_path, 2, *flags, *offload, "--load", tmp_path / "kept")
    losses = [entry["lm_loss"] for entry in resident]
    assert [entry["lm_loss"] for entry in offloaded] == losses
    assert [entry["lm_loss"] for entry in resumed] == losses[2:]
    assert {tuple(entry["chunk_loads"]) for entry in offloaded} == {(3, 3)}
    assert all(min(entry["transferred_bytes"]) > 0 for entry in offloaded)
    assert {entry["chunk_loads"] for entry in resident} == {None}
