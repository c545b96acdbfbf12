"""Training scripts that know nothing of sub-sequences, run unmodified under the adaptor."""

import re
import shlex
import subprocess
import sys
import time

import pytest

from seq1f1b.schedule import Kind, zb_h1
from seq1f1b.timeline import read_trace
from tests.distributed.training_runs import ARGUMENTS, SCRIPTS, run_ranks, torchrun, train
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

_VIRTUAL = "--num-virtual-stages-per-pipeline-rank"


def test_tensor_and_pipeline_parallel_losses_are_those_of_one_split(tmp_path):
    flags = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    whole = train(tmp_path, 4, *flags, "--seq1f1b-splits", 1)
    cut = train(tmp_path, 4, *flags, "--seq1f1b-splits", 3)
    assert len(whole) == len(cut) == 4
    for a, b in zip(whole, cut, strict=True):
        assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=1e-5)
        assert len(b["bubble_ratio"]) == len(b["peak_activation_bytes"]) == 2
        assert all(0 < ratio < 1 for ratio in b["bubble_ratio"])
        assert a["kv_carry_bytes"] == [0, 0]
        assert all(carried > 0 for carried in b["kv_carry_bytes"])
    assert whole[-1]["lm_loss"] < whole[0]["lm_loss"]


@pytest.mark.long
@pytest.mark.parametrize(
    "layout",
    [
        "--pipeline-model-parallel-size 2 --expert-tensor-parallel-size 1",
        "--expert-tensor-parallel-size 2",  # ranks gather uneven numbers of tokens
    ],
)
def test_sequence_and_expert_parallel_losses_are_those_of_one_split(tmp_path, layout):
    flags = shlex.split(
        f"--tensor-model-parallel-size 2 --sequence-parallel {layout} "
        "--expert-model-parallel-size 2 --num-experts 4 --global-batch-size 4 "
        "--moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0.01 "
        "--moe-z-loss-coeff 1e-3 --disable-bias-linear --normalization RMSNorm --swiglu "
        "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights"
    )
    whole, cut = (train(tmp_path, 4, *flags, "--seq1f1b-splits", s) for s in (1, 3))
    losses = [[entry["lm_loss"] for entry in entries] for entries in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]


@pytest.mark.parametrize(
    "kind, virtual",
    [("zb-h1", ()), pytest.param("greedy", (_VIRTUAL, 2), marks=pytest.mark.long)],
)
def test_split_backwards_with_overlapped_reduction(tmp_path, kind, virtual):
    """The batch grows meanwhile: from 2 micro-batches to 4."""
    flags = (
        *("--pipeline-model-parallel-size", 2, "--global-batch-size", 8, "--ddp-num-buckets", 3),
        *("--rampup-batch-size", 4, 4, 8),
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    )
    file = tmp_path / "trace.jsonl"
    whole = train(tmp_path, 4, *flags, *virtual, "--seq1f1b-splits", 1)
    cut = ("--seq1f1b-splits", 3, "--seq1f1b-schedule", kind, "--seq1f1b-trace-file", file)
    split = train(tmp_path, 4, *flags, *virtual, *cut)
    losses = [[entry["lm_loss"] for entry in entries] for entries in (whole, split)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    traced = read_trace(file)
    kinds = {span.action.kind for spans in traced.stages for span in spans}
    assert {Kind.F, Kind.I, Kind.W} <= kinds
    if kind == "zb-h1":
        planned = zb_h1(2, 4, 3)
        ran = [tuple(span.action for span in spans) for spans in traced.stages]
        assert ran == list(planned.stages)


def test_a_rank_that_raises_ends_the_job(tmp_path):
    run = torchrun(
        2,
        *("-m", "megatron.adaptor", SCRIPTS / "failing_gpt.py", *ARGUMENTS),
        *("--pipeline-model-parallel-size", 2, "--seq1f1b-splits", 4),
    )
    ended = time.time()
    assert run.returncode != 0
    # Fifth call on stage 1: that for the loss of micro-batch 0, with its last sub-sequence.
    assert "rank 1, iteration 1, stage 1, step" in run.stderr
    raised = re.search(r"action 0F0\.3: cosmic ray at ([0-9.]+)", run.stderr)
    assert raised, run.stderr[-4000:]
    assert ended - float(raised[1]) < 30


FAULTS = {
    "leave:1": "PeerLostError: rank 0, iteration 2, stopped because it lost another rank",
    "worker:0": r"DataLoader worker \(pid \d+\) is killed by signal",
    "settings:1": "--seq1f1b-balance-method is 'uniform_comp' on rank 0, 'average' on rank 1",
    "end:0": "rank 0, iteration 2, stage 0, .*the data iterator ended before micro-batch",
}


@pytest.mark.parametrize("fault", mostly_long(FAULTS, default=["settings:1"]))
def test_a_fault_is_named_by_the_rank_that_has_it(monkeypatch, fault):
    monkeypatch.setenv("FAULT", f"{fault}:2")
    run = torchrun(
        2,
        *("-m", "megatron.adaptor", SCRIPTS / "faulty_gpt.py", *ARGUMENTS, "--num-workers", 1),
        *("--pipeline-model-parallel-size", 2, "--seq1f1b-splits", 4),
        *("--distributed-timeout-minutes", 1),
    )
    assert run.returncode != 0
    root = run.stderr.rpartition("Root Cause (first observed failure)")[2]
    assert re.search(FAULTS[fault], root), run.stderr[-4000:]


def test_no_such_script():
    run = subprocess.run(
        [sys.executable, "-m", "megatron.adaptor", "nowhere.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "no such script: nowhere.py" in run.stderr


_PRETRAIN = "import pretrain_gpt; pretrain_gpt.main()"
_LATE = f"import os, time; time.sleep(2.0 * (os.environ['RANK'] == '0')); {_PRETRAIN}"
_ALONE = f"""
import os, sys
from megatron.adaptor.command_line import refusals
refusals._PATIENCE = 0.1
if os.environ["RANK"] == "1":
    sys.argv += ["--data-cache-path", os.devnull]
{_PRETRAIN}
"""
_REFUSED = ("--seq1f1b-splits", 2, "--seq1f1b-max-live", 4)


def test_a_refusal_is_printed_though_rank_0_is_the_last_to_come_to_it():
    """The first rank that ends is the end of all."""
    run = run_ranks(2, "-c", _LATE, *ARGUMENTS, *_REFUSED, "--pipeline-model-parallel-size", 2)
    assert run.returncode == 1
    assert "cannot run with these arguments:\n  - --seq1f1b-max-live 4 goes with" in run.stderr


def test_a_rank_that_alone_refuses_says_why():
    """A folder may be missing on one machine of many."""
    flags = ("--pipeline-model-parallel-size", 2, "--tokenizer-type", "NullTokenizer")
    run = run_ranks(2, "-c", _ALONE, *ARGUMENTS, *flags)
    assert run.returncode == 2
    assert "rank 1: Seq1F1B cannot run with these arguments:" in run.stderr
    assert "--data-cache-path /dev/null: cannot be written into" in run.stderr
