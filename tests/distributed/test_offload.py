"""Model chunks in host memory train bit for bit as on the device, with freed memory poisoned."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seq1f1b.schedule import num_loads
from tests.distributed.megatron_model import Case
from tests.distributed.offload_cases import Visits, compare
from tests.distributed.training_runs import ARGUMENTS, SCRIPTS, run_ranks, torchrun
from tests.selection import mostly_long
from tests.workers import WorkerError

pytestmark = pytest.mark.distributed

V2 = Case(2, 4, 1, num_chunks=2, layers=4, length=16)
V4 = Case(2, 4, 1, num_chunks=4, layers=8, length=16)
V8 = Case(2, 2, 1, num_chunks=8, layers=16, length=16)
ONE = {"turn": 1000}
BF16 = {"bf16": True}
FP16 = {"fp16": True}
FEW = {"steps": 5}  # of 10, for shapes that take longer
FREE = ONE | {"clip": 0.0}  # gradients of any norm, which lets updates begin on their arrival


def cut(case: Case, **more: Any) -> Case:
    """Return ``case`` in 3 sub-sequences of each of half as many micro-batches."""
    return replace(case, num_splits=3, num_micro_batches=2, **more)


def way(slots: int, *options: str) -> dict[str, Any]:
    return {"slots": slots, **dict.fromkeys(options, True)}


def run(workers: Any, case: Case, common: dict[str, Any], *ways: dict[str, Any]):
    """Return for each rank the resident run and the others."""
    return workers(case.num_ranks).run(compare, case, common, list(ways), timeout=200)


def same(one: Visits, other: Visits) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("weights", "states", "losses", "norms")
    )


TRACKER = "latest_checkpointed_iteration.txt"
NORM = re.compile(r"params norm: ([\d.]+)")
VALIDATION = re.compile(r"validation loss at iteration 4 .* PPL: \S+")
LATE, EARLY, GPU = "just_in_time", "prefetch", "gpu"
# a copy of a chunk takes some milliseconds, beside the computations, and both ranks share the link
PACED = {"pace": 0.05, "roots": (0, 0)}
GRID: dict[str, tuple[Case, dict[str, Any], list[dict[str, Any]]]] = {
    "v2": (V2, ONE, [way(1), way(2, LATE, EARLY)]),
    "v4": (V4, ONE, [way(1, LATE), way(2, EARLY), way(3, LATE, EARLY)]),
    "paced": (V4, ONE | FEW, [way(2, LATE, EARLY) | PACED, way(2) | PACED]),
    "v8": (V8, ONE | BF16 | FEW, [way(2, LATE, EARLY), way(3)]),
    "v4 bf16": (cut(V4), ONE | BF16, [way(1, EARLY), way(2, LATE), way(3, LATE)]),
    "evaluated": (cut(V4), ONE | {"evaluates": True}, [way(2, LATE, EARLY)]),
    "recomputed": (
        cut(V4, recompute=True, recompute_loss=True),
        ONE | FEW,
        [way(1), way(2, LATE, EARLY)],
    ),
    "v8 recomputed": (cut(V8, recompute=True), ONE | FEW, [way(1, LATE)]),
    "tied": (cut(V4, tied=True, recompute_loss=True), ONE | BF16, [way(2, LATE)]),
    "v4 fp16": (cut(V4), ONE | FP16, [way(1, EARLY), way(2, LATE), way(3, LATE) | PACED]),
    "per token": (cut(V2, per_token=True), ONE, [way(1, LATE, EARLY)]),
    "packed": (cut(V4, documents="cu_seqlens"), ONE | FEW, [way(2, LATE, EARLY)]),
    "experts": (cut(V2, experts="aux_loss"), ONE, [way(1, LATE)]),
    "experts dealt": (
        replace(V2, experts="aux_loss", experts_shared=2, replicas=2),
        ONE | FEW,
        [way(1, LATE)],
    ),
    "turns": (V4, {"turn": 2} | FEW, [way(2, LATE), way(3, EARLY) | PACED, way(1)]),
    "turns bf16": (cut(V4), {"turn": 3} | BF16 | FEW, [way(2, EARLY), way(3, LATE)]),
    "beside a gpu": (
        cut(V4, tied=True, per_token=True),
        ONE | FEW | {"evaluates": True},
        [way(1, LATE, GPU), way(2, EARLY, GPU)],
    ),
    "beside a gpu, bf16": (
        replace(cut(V2, recompute=True), replicas=2),
        {"turn": 3} | BF16 | FEW,
        [way(1, LATE, EARLY, GPU)],
    ),
    "replicas": (replace(V2, replicas=2), ONE | FEW, [way(1, LATE, EARLY)]),
    "tensor": (cut(V2, tensor=2), ONE | BF16 | FEW, [way(1, LATE)]),
    "arrival": (
        V4,
        FREE | FEW,
        [way(1, LATE), way(2, LATE, EARLY) | PACED, way(2, LATE, EARLY, GPU)],
    ),
    "arrival, tied": (
        cut(V4, tied=True),
        FREE | BF16 | FEW | {"evaluates": True},
        [way(2, LATE) | PACED, way(1, LATE, EARLY), way(2, LATE, GPU)],
    ),
    "arrival, gradients in bf16": (
        replace(V4, ddp={"grad_reduce_in_fp32": False}),
        FREE | BF16,
        [way(1, LATE, EARLY), way(2, LATE), way(3, LATE, EARLY, GPU)],
    ),
    "arrival, turns": (
        V4,
        FREE | FEW | {"turn": 2},
        [way(1, LATE), way(2, LATE, EARLY) | PACED, way(2, LATE, EARLY, GPU)],
    ),
    "arrival, recomputed": (
        cut(V4, recompute=True, recompute_loss=True),
        FREE | FEW,
        [way(2, LATE, EARLY)],
    ),
    "arrival, packed": (cut(V4, documents="cu_seqlens"), FREE | FEW, [way(2, LATE, EARLY)]),
    "arrival, experts": (
        cut(V2, experts="aux_loss"),
        FREE,
        [way(1, LATE, EARLY), way(2, LATE, GPU)],
    ),
    "arrival, tensor": (cut(V2, tensor=2), FREE | BF16 | FEW, [way(1, LATE)]),
    "no arrival, tensor": (
        cut(V2, tensor=2, sequence_parallel=True),
        FREE | BF16 | FEW,
        [way(1, LATE)],
    ),
    "arrival, replicas": (
        replace(V4, replicas=2),
        FREE | BF16 | FEW,
        [way(1, LATE), way(2, LATE, EARLY) | PACED, way(2, LATE, EARLY, GPU)],
    ),
    "arrival, experts dealt": (
        replace(V2, experts="aux_loss", experts_shared=2, replicas=2),
        FREE | FEW,
        [way(1, LATE)],
    ),
    "no arrival, per token": (cut(V2, per_token=True), FREE, [way(1, LATE, EARLY)]),
}


def num_early(case: Case, common: dict[str, Any], rank: int) -> int:
    """Return the chunks whose gradients are home, and final, before the last backward of a step.

    The last backward is chunk 0's.
    """
    if common.get("clip") != 0.0:
        return 0
    return sum(final_chunks(case, rank)[1:])


def final_chunks(case: Case, rank: int) -> list[bool]:
    """Return for each model chunk of a rank whether its gradients stay after their reduction."""
    stage = rank // (case.num_ranks // case.num_stages)
    is_final = [not case.per_token and not case.sequence_parallel] * case.num_chunks
    if case.tied and stage in (0, case.num_stages - 1):
        is_final[-1 if stage else 0] = False
    return is_final


@pytest.mark.parametrize("name", mostly_long(GRID, default=["tied", "beside a gpu", "arrival"]))
def test_training_is_bit_for_bit_the_same(workers, name):
    """Slots take what the largest chunk takes, and nothing else is on the device, ever."""
    case, common, ways = GRID[name]
    for rank, (resident, *others) in enumerate(run(workers, case, common, *ways)):
        assert len(set(resident.losses)) > 1 or not resident.losses[0]
        for how, offloaded in zip(ways, others, strict=True):
            assert same(resident, offloaded), how
            assert offloaded.device_bytes == {how["slots"] * offloaded.largest_bytes}
            num_updates = len(offloaded.norms) - offloaded.norms.count(-1.0)
            assert offloaded.late == (num_updates if LATE in how else 0)
            assert 0 < num_updates <= len(offloaded.norms) - ("fp16" in common)
            early = num_early(case, common, rank) if LATE in how else 0
            assert offloaded.early == [early] * len(offloaded.norms)
            check_traffic(case, common, how["slots"], offloaded)
            check_reductions(case, common, rank, offloaded)


def check_reductions(case: Case, common: dict[str, Any], rank: int, visits: Visits) -> None:
    """Compare what was reduced, and of what norms were taken, before it left the device."""
    assert visits.reduced == case.num_chunks * len(visits.norms)
    num_normed, num_weights = visits.weights_normed
    is_final = [is_final and "fp16" not in common for is_final in final_chunks(case, rank)]
    if all(is_final):
        assert num_normed == num_weights
    elif any(is_final):
        assert num_weights / 2 < num_normed < num_weights
    else:
        assert num_normed == 0


def check_traffic(case: Case, common: dict[str, Any], slots: int, visits: Visits) -> None:
    """Compare what the copies counted with what the buffers hold."""
    one_turn = common["turn"] == 1000
    loads = num_loads(case.num_chunks, slots, 1 if one_turn else 2)
    are_wider = bool(common.keys() & {"bf16", "fp16"}) and case.ddp.get("grad_reduce_in_fp32", True)
    gradients = visits.buffer_bytes * (4 / 6 if are_wider else 1 / 2)
    if one_turn:
        assert visits.loads == [loads] * len(visits.loads)
        assert visits.gradients_in == 0
        assert visits.gradients_out == gradients
    elif slots > 1:
        assert all(loads <= number <= loads + 2 for number in visits.loads)
        assert visits.gradients_in > 0
    largest = visits.largest_bytes * (2 / 6 if are_wider else 1 / 2)
    whole = visits.buffer_bytes - gradients
    assert whole <= visits.weights_in <= visits.loads[0] * largest


@pytest.mark.parametrize(
    "name",
    mostly_long(["v4", "tied", "experts", "experts dealt", "replicas"], default=["tied"]),
)
def test_memory_is_estimated_from_below(workers, name):
    """Buffers begin each parameter at a multiple of 64 elements, which estimates leave out."""
    case, common, _ = GRID[name]
    for (resident,) in run(workers, case, common | {"steps": 1}):
        assert 0.93 < resident.estimated_bytes / resident.host_bytes <= 1
        assert 0.93 < resident.planned_bytes / resident.largest_bytes <= 1


def test_a_chunk_that_comes_back_to_another_slot_trains_wrongly(workers):
    """Saved tensors point to the old place: without this, the comparisons would prove nothing."""
    ways = [way(2), way(2, "moves")]
    ranks = run(workers, V4, ONE | {"steps": 2}, *ways)
    assert all(same(resident, right) for resident, right, _ in ranks)
    assert not any(same(resident, moved) for resident, _, moved in ranks)
    assert any(math.isnan(loss) for _, _, moved in ranks for loss in moved.losses) or all(
        resident.weights != moved.weights for resident, _, moved in ranks
    )


@pytest.mark.long
@pytest.mark.parametrize("common", [ONE, FREE])
def test_an_update_that_fails_is_an_error_of_the_load_that_waits_for_it(workers, common):
    message = "LOAD.*: the optimizer's update of a model chunk failed: cosmic ray"
    with pytest.raises(WorkerError, match=message):
        run(workers, V2, common | {"steps": 2}, way(1, LATE, "fails"))


@pytest.mark.long
def test_nothing_is_saved_after_a_step_that_broke_off_between_updates(workers):
    message = "UpdateError: a step was left when 1 of this stage's model chunks had begun"
    with pytest.raises(WorkerError, match=message):
        run(workers, V2, FREE | {"steps": 1}, way(1, LATE, "breaks"))


def start(
    file: Path, script: str, *flags: object, by: Callable[..., Any] = run_ranks
) -> tuple[Any, list[dict[str, Any]]]:
    """Run a script on 2 ranks; return how it ended and what each iteration logged."""
    run = by(
        2,
        *("-m", "megatron.adaptor", SCRIPTS / script, *ARGUMENTS),
        *("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2),
        *("--use-distributed-optimizer", "--seq1f1b-splits", 2),
        *("--seq1f1b-metrics-file", file, *flags),
    )
    return run, [json.loads(line) for line in file.read_text().splitlines()]


def losses(entries: list[dict[str, Any]]) -> list[float]:
    return [entry["lm_loss"] for entry in entries]


ARRIVAL = "> just-in-time updates on arrival of gradients: "


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "fault, of_optimizer, told",
    [
        (
            "update:1:4",
            (),
            "none, but at the end of the step: --clip-grad 1 (must be 0), --rerun-mode "
            "validate_results (must be disabled)",
        ),
        (
            "arrival:0:4",
            ("--clip-grad", 0, "--rerun-mode", "disabled"),
            "model chunks 1 of the first stage, and 0 at the end of the step: no "
            "--untie-embeddings-and-output-weights",
        ),
    ],
)
def test_a_script_is_killed_in_an_update_and_resumes(
    tmp_path, monkeypatch, fault, of_optimizer, told
):
    """From checkpoints of resident and of offloaded training come the losses of a whole run."""
    late = ("--offload-model-chunks", 1, "--offload-prefetch", "--offload-just-in-time-updates")
    late += of_optimizer
    first, kept, norm = tmp_path / "first", tmp_path / "kept", "--log-params-norm"
    save = ("--save", first, "--save-interval", 1)
    save += of_optimizer
    whole, expected = start(tmp_path / "whole", "plain_gpt.py", "--seq1f1b-turn", 6, norm, *save)
    assert whole.returncode == 0, whole.stderr[-4000:]
    assert {entry["chunk_loads"] for entry in expected} == {None}

    (first / TRACKER).write_text("1")
    save = ("--load", first, "--save", kept, "--save-interval", 2)
    monkeypatch.setenv("FAULT", fault)
    killed, entries = start(tmp_path / "killed", "faulty_gpt.py", *late, *save, by=torchrun)
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in killed.stderr
    assert losses(entries) == losses(expected)[1:3]
    assert {tuple(entry["chunk_loads"]) for entry in entries} == {(3, 3)}
    assert all(min(entry["transferred_bytes"]) > 0 for entry in entries)

    assert (kept / TRACKER).read_text() == "2"
    resumed, entries = start(tmp_path / "resumed", "plain_gpt.py", *late, norm, "--load", kept)
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert losses(entries) == losses(expected)[2:]
    assert [line for line in resumed.stdout.splitlines() if ARRIVAL in line] == [ARRIVAL + told]
    assert ARRIVAL not in whole.stdout
    of_whole, of_resumed = (NORM.findall(run.stdout) for run in (whole, resumed))
    assert of_resumed == of_whole[-len(of_resumed) :]
    assert len(set(of_resumed)) > 1
    assert VALIDATION.findall(resumed.stdout) == VALIDATION.findall(whole.stdout) != []
