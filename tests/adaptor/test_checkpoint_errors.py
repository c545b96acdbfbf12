"""What a user reads of a checkpoint that cannot be loaded, or for which there is no room."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron.adaptor.checkpoints.loading import (
    CheckpointError,
    FinishedError,
    Loading,
    fix_query_key_value_ordering,
    load_base_checkpoint,
    read_metadata,
)
from megatron.adaptor.checkpoints.room import Room, why_full

TRACKER = "latest_checkpointed_iteration.txt"


def leave(*args, **kwargs):
    sys.exit()


def leave_handling(error):
    def end(*args, **kwargs):
        try:
            raise error
        except type(error):
            sys.exit()

    return end


@pytest.mark.parametrize(
    "text, folders, message",
    [
        ("", ["iter_0000004", "iter_0000012"], "is empty, .* iter_0000012: write 12 into the file"),
        ("sixteen", [], "says 'sixteen', .* no checkpoint beside it: leave --load out"),
    ],
)
def test_a_tracker_without_an_iteration_is_an_error(tmp_path, text, folders, message):
    from megatron.training import checkpointing

    (tmp_path / TRACKER).write_text(text)
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metadata.json").write_text("{}")
    (tmp_path / "iter_0000020").mkdir()  # cut off
    original = getattr(checkpointing.read_metadata, "__wrapped__", checkpointing.read_metadata)
    with pytest.raises(CheckpointError, match=f"{TRACKER} {message}"):
        read_metadata(original, str(tmp_path / TRACKER))


def test_a_tracker_with_an_iteration_is_read(tmp_path):
    from megatron.training import checkpointing

    (tmp_path / TRACKER).write_text("12")
    original = getattr(checkpointing.read_metadata, "__wrapped__", checkpointing.read_metadata)
    assert read_metadata(original, str(tmp_path / TRACKER)) == (12, False)


def divided(size, **changes):
    usual = {"finetune": False, "no_load_optim": False, "no_save_optim": False}
    return Namespace(**usual | {"expert_model_parallel_size": size} | changes)


@pytest.mark.parametrize(
    "saved, wanted, message",
    [
        (
            2,
            1,
            "with --expert-model-parallel-size 2, .* with 1: resume with a size above 1, or add",
        ),
        (1, 4, "with --expert-model-parallel-size 1, .* with 4: resume with 1, or add --no-load-o"),
    ],
)
def test_an_optimizer_that_keeps_experts_apart_goes_on_as_one(saved, wanted, message):
    state = {"args": divided(saved)}
    with pytest.raises(CheckpointError, match=f"--load folder: the checkpoint was saved {message}"):
        load_base_checkpoint(lambda *_: (state, "", False, None), "folder", divided(wanted))


@pytest.mark.parametrize(
    "state, wanted",
    [
        (None, divided(1)),
        ({}, divided(1)),
        ({"args": divided(2)}, divided(4)),
        ({"args": divided(2)}, divided(1, finetune=True)),
        ({"args": divided(2)}, divided(1, no_load_optim=True)),
        ({"args": divided(2, no_save_optim=True)}, divided(1)),
    ],
)
def test_checkpoints_without_such_a_change_are_loaded(state, wanted):
    found = (state, "", False, None)
    assert load_base_checkpoint(lambda *_: found, "folder", wanted) is found


@pytest.mark.parametrize(
    "original, message",
    [
        (leave, "--load folder: there is no latest_checkpointed_iteration.txt"),
        (leave_handling(OSError("bad zip")), "--load folder: .* cannot be read: OSError: bad zip"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_an_error(original, message):
    with pytest.raises(CheckpointError, match=message):
        load_base_checkpoint(original, "folder", None)


@pytest.mark.parametrize(
    "missing, message",
    [
        ("total_iters", "of which iteration it is: load it with --finetune"),
        ("rng_state", "no-load-rng"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_an_error(missing, message):
    loading = Loading(lambda: Namespace(load="folder"))
    with pytest.raises(CheckpointError, match=f"--load folder: .*{message}"):
        loading.load_checkpoint(leave_handling(KeyError(missing)), [])


def test_an_unknown_version_is_an_error():
    with pytest.raises(CheckpointError, match=r"version 0\.5, which Megatron does not know"):
        fix_query_key_value_ordering(leave, None, 0.5)


def test_exit_codes_of_others_pass():
    def refuse(*args):
        sys.exit(7)

    with pytest.raises(SystemExit) as end:
        Loading(lambda: None).load_checkpoint(refuse)
    assert end.value.code == 7


def job(**values):
    base = {"load": "folder", "skip_train": False, "perform_rl_step": False, "train_iters": 8}
    return Loading(lambda: Namespace(**(base | values)))


def test_a_finished_run_says_so():
    with pytest.raises(FinishedError, match=r"iteration 8 and --train-iters is 8.*nothing left"):
        job(iteration=8).build_data_iterators(leave)


@pytest.mark.parametrize(
    "values",
    [{"iteration": 7}, {"iteration": 8, "skip_train": True}, {"iteration": 0, "train_iters": None}],
)
def test_a_run_with_something_to_do_goes_on(values):
    assert job(**values).build_data_iterators(lambda provider: provider, "data") == "data"


def test_a_disk_with_room_is_not_blamed(tmp_path):
    assert why_full(tmp_path / "not" / "there", RuntimeError("unexpected pos 704 vs 598")) is None


def test_a_full_disk_is_named_from_the_error(tmp_path):
    error = RuntimeError("unexpected pos 704 vs 598")
    error.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert why_full(tmp_path, error) == "the disk quota is used up"


def test_a_full_disk_is_found_without_a_hint(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    room = Room(lambda: Namespace(save=str(small)))
    try:
        (small / TRACKER).write_text("4")
        with pytest.raises(CheckpointError, match=r"because the disk is full; that of iteration 4"):
            room.save(fill, small / "tensors")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def fill(file: Path):
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))
    raise CheckpointException("write", {})


def test_a_limit_on_files_is_found_without_a_hint(tmp_path):
    program = (
        "import sys; from pathlib import Path; "
        "from megatron.adaptor.checkpoints.room import why_full; "
        "print(why_full(Path(sys.argv[1]), RuntimeError('unexpected pos')))"
    )
    (tmp_path / "tensors").write_bytes(bytes(4 << 20))
    limit = (4 << 20, resource.RLIM_INFINITY)
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "files may not become so large (ulimit -f)", run.stderr
