"""Checkpoints in Megatron's torch_dist format go from any schedule and layout to any other.

The loss curve after a resumption is that of the run that was never interrupted: weights, optimizer,
random numbers and the place in the data are those of the saved iteration.
"""

import shlex

import pytest

from tests.distributed.training_runs import train
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

STAGES = "--pipeline-model-parallel-size"
LONGER = shlex.split(
    "--train-iters 6 --eval-interval 6 --global-batch-size 4 --ckpt-format torch_dist "
    "--make-vocab-size-divisible-by 64"
)
RESUMED = {
    "more splits": (2, f"{STAGES} 2 --seq1f1b-splits 4"),
    "tensor parallelism": (2, "--tensor-model-parallel-size 2 --seq1f1b-splits 3"),
    "virtual stages": (
        2,
        f"{STAGES} 2 --num-virtual-stages-per-pipeline-rank 2 --seq1f1b-splits 3 "
        "--seq1f1b-schedule greedy",
    ),
}


def losses(entries):
    return {entry["iteration"]: entry["lm_loss"] for entry in entries}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of iteration 3 under 1F1B, and the losses of that run to its end."""
    folder = tmp_path_factory.mktemp("checkpoint")
    entries = train(
        folder,
        2,
        *LONGER,
        *(STAGES, 2, "--save", folder, "--save-interval", 3, "--seq1f1b-splits", 1),
    )
    return go_back(folder, 3), losses(entries)


def go_back(folder, iteration):
    """Make ``iteration`` the one to resume from."""
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


@pytest.mark.parametrize("name", mostly_long(RESUMED, default=["tensor parallelism"]))
def test_1f1b_goes_on_as_seq1f1b(tmp_path, saved, name):
    checkpoint, uninterrupted = saved
    num_ranks, flags = RESUMED[name]
    entries = train(tmp_path, num_ranks, *LONGER, "--load", checkpoint, *shlex.split(flags))
    assert losses(entries) == {k: pytest.approx(uninterrupted[k], rel=1e-5) for k in (4, 5, 6)}


def test_seq1f1b_goes_on_as_1f1b_elsewhere(tmp_path, saved):
    _, uninterrupted = saved
    flags = ("--save", tmp_path, "--save-interval", 4, "--async-save")
    cut = train(tmp_path, 2, *LONGER, *flags, STAGES, 2, "--seq1f1b-splits", 4)
    assert losses(cut) == {k: pytest.approx(loss, rel=1e-5) for k, loss in uninterrupted.items()}
    alone = train(tmp_path, 1, *LONGER, "--load", go_back(tmp_path, 4))
    assert losses(alone) == {k: pytest.approx(uninterrupted[k], rel=1e-5) for k in (5, 6)}


RESHARDED = {
    "as it was": (2, f"{STAGES} 2 --seq1f1b-splits 3"),
    "more stages": (4, f"{STAGES} 4 --seq1f1b-splits 3"),
    "tensor parallelism": (2, "--tensor-model-parallel-size 2 --seq1f1b-splits 3"),
    "more replicas": (4, f"{STAGES} 2 --seq1f1b-splits 4"),
    "virtual stages": (2, f"{STAGES} 2 --num-virtual-stages-per-pipeline-rank 2"),
}


@pytest.mark.long
def test_a_distributed_optimizer_is_resharded(tmp_path):
    """From uneven stages to any other layout, in the one format that can."""
    flags = (*LONGER, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    uneven = shlex.split(f"{STAGES} 2 --decoder-first-pipeline-num-layers 1 --seq1f1b-splits 3")
    whole = losses(train(tmp_path, 2, *flags, *uneven, "--save", tmp_path, "--save-interval", 3))
    for name, (num_ranks, layout) in RESHARDED.items():
        resumed = train(
            tmp_path, num_ranks, *flags, "--load", go_back(tmp_path, 3), *shlex.split(layout)
        )
        expected = {k: pytest.approx(whole[k], rel=1e-5) for k in (4, 5, 6)}
        assert losses(resumed) == expected, name


@pytest.mark.long
def test_random_numbers_and_a_distributed_optimizer_go_on(tmp_path):
    flags = (
        *LONGER,
        *("--use-distributed-optimizer", "--ckpt-fully-parallel-save", "--hidden-dropout", "0.1"),
        *("--seq1f1b-splits", 4, STAGES, 2),
    )
    whole = losses(train(tmp_path, 4, *flags, "--save", tmp_path, "--save-interval", 3))
    resumed = losses(train(tmp_path, 4, *flags, "--load", go_back(tmp_path, 3)))
    assert resumed == {k: pytest.approx(whole[k], rel=1e-6) for k in (4, 5, 6)}


def test_a_distributed_optimizer_resumes_from_the_format_of_files_for_each_rank(tmp_path):
    flags = (*LONGER, "--use-distributed-optimizer", "--ckpt-format", "torch", STAGES, 2)
    saved = train(tmp_path, 2, *flags, "--save", tmp_path, "--save-interval", 3)
    resumed = train(tmp_path, 2, *flags, "--load", go_back(tmp_path, 3))
    assert losses(resumed) == {k: losses(saved)[k] for k in (4, 5, 6)}


PADDED = {
    "overlapped reduction": (
        2,
        "--overlap-grad-reduce --ddp-bucket-size 3000 --dist-ckpt-optim-fully-reshardable",
    ),
    "shared embeddings": (2, f"{STAGES} 2 --num-layers 2 --dist-ckpt-optim-fully-reshardable"),
    "shared embeddings, kept by rank": (2, f"{STAGES} 2 --num-layers 2"),
}


@pytest.mark.parametrize("name", mostly_long(PADDED, default=["overlapped reduction"]))
def test_buckets_that_end_in_padding_are_resumed(tmp_path, name):
    num_ranks, layout = PADDED[name]
    flags = (
        *LONGER,
        *("--use-distributed-optimizer", "--hidden-size", 40, "--seq1f1b-splits", 2),
        *shlex.split(layout),
    )
    saved = train(tmp_path, num_ranks, *flags, "--save", tmp_path, "--save-interval", 3)
    resumed = train(tmp_path, num_ranks, *flags, "--load", go_back(tmp_path, 3))
    assert losses(resumed) == {k: losses(saved)[k] for k in (4, 5, 6)}
