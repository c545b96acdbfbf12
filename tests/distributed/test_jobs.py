"""Jobs that are ended, killed and started again, as a cluster does it."""

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from seq1f1b.processes import end_with_parent
from tests.distributed.training_runs import ARGUMENTS, SCRIPTS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

TRACKER = "latest_checkpointed_iteration.txt"
ENDLESS = shlex.split(
    "--train-iters 100000 --eval-iters 0 --eval-interval 100000 --ckpt-format torch_dist "
    "--seq1f1b-splits 3 --save-interval 10"
)
MARK = "SEQ1F1B_TEST_MARK"


class Job:
    """A training that runs until it is ended; its processes are known by a mark."""

    def __init__(self, folder: Path, num_ranks: int, *flags: object) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        words = (
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks),
            *("-m", "megatron.adaptor", SCRIPTS / "plain_gpt.py", *ARGUMENTS, *ENDLESS, *flags),
            *("--pipeline-model-parallel-size", num_ranks, "--save", folder),
        )
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, MARK: self.mark},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: end_with_parent(number=signal.SIGTERM),
        )

    @property
    def saved(self) -> int:
        """The iteration of the last checkpoint."""
        tracker = self.folder / TRACKER
        return int((tracker.read_text() if tracker.exists() else "") or 0)

    def wait_for_a_checkpoint(self) -> int:
        deadline = time.monotonic() + 150
        while not self.saved:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)
        return self.saved

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read()[-6000:]

    def processes(self) -> dict[int, str]:
        """Return the command of each process of this job that still runs."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}" in (folder / "environ").read_text(errors="replace"):
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def left(self, seconds: float = 15.0) -> dict[int, str]:
        """Return what still runs after some time to end in."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.processes()


@pytest.mark.parametrize("flags", ["", pytest.param("--async-save", marks=pytest.mark.long)])
def test_a_job_that_is_told_to_end_saves_first(tmp_path, flags):
    job = Job(tmp_path, 2, "--exit-signal-handler", *shlex.split(flags))
    before = job.wait_for_a_checkpoint()
    job.process.terminate()
    job.process.wait(timeout=90)
    assert job.left() == {}
    assert "exiting program after receiving SIGTERM" in job.text()
    assert "forcefully" not in job.text()
    assert job.saved % 10 or job.saved > before + 10
    assert (tmp_path / f"iter_{job.saved:07d}" / "metadata.json").is_file()
    assert "Traceback" not in job.text().partition("exiting program")[0]


@pytest.mark.long
def test_a_killed_rank_leaves_no_process(tmp_path):
    job = Job(tmp_path, 1)
    job.wait_for_a_checkpoint()
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text()
    os.kill(int(children), signal.SIGKILL)
    assert job.process.wait(timeout=60) == 1
    assert job.left() == {}


@pytest.mark.long
def test_a_job_is_started_again(tmp_path):
    folders = ("--save", tmp_path, "--load", tmp_path)
    flags = (*ARGUMENTS, "--ckpt-format", "torch_dist", "--save-interval", 4, *folders)
    command = ("-m", "megatron.adaptor", SCRIPTS / "plain_gpt.py", *flags)
    assert run_ranks(1, *command).returncode == 0
    again = run_ranks(1, *command)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "is of iteration 4 and --train-iters is 4: there is nothing left" in again.stdout
    (tmp_path / TRACKER).write_text("")
    empty = run_ranks(1, *command)
    assert empty.returncode != 0
    assert f"{TRACKER} is empty" in empty.stderr
    assert "iter_0000004: write 4 into the file" in empty.stderr


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of some size, or skip the test where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, check=False).returncode:
            pytest.skip("a file system of some size cannot be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.long
def test_a_disk_without_room_is_refused(disk):
    run = save_on(disk("512k"), 2)
    assert run.returncode != 0
    assert "a checkpoint takes about 0.000" in run.stderr
    assert "GiB are left: make room, or name another folder" in run.stderr
    assert "iteration        1/" not in run.stdout


@pytest.mark.long
def test_a_disk_that_becomes_full_is_named(disk):
    run = save_on(disk("2m"), 2)
    assert run.returncode != 0
    assert "was not saved, because the disk is full; that of iteration" in run.stderr


def save_on(folder: Path, num_ranks: int) -> subprocess.CompletedProcess[str]:
    flags = ("--ckpt-format", "torch_dist", "--save-interval", 1, "--train-iters", 20)
    return run_ranks(
        num_ranks,
        *("-m", "megatron.adaptor", SCRIPTS / "plain_gpt.py", *ARGUMENTS, *flags),
        *("--pipeline-model-parallel-size", num_ranks, "--save", folder),
    )
