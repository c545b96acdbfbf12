"""``seq1f1b train`` as a person types it: under torchrun, under srun, killed, with DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.ulysses.ranks import run_ranks
from seq1f1b.ulysses.training.launch import init_dist
from seq1f1b.ulysses.training.trainer import train
from tests.ulysses.training.recipes import content, recipe, write_texts

pytestmark = pytest.mark.distributed

SRUN = """#!{python}
# Starts a command SLURM_NTASKS times, as srun does on one node.
import os, subprocess, sys
tasks = int(sys.argv[1].removeprefix("--ntasks="))
shared = dict(SLURM_NTASKS=str(tasks), SLURM_NODELIST="localhost", SLURM_JOB_ID=str(os.getpid()))
def start(i):
    own = dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
    return subprocess.Popen(sys.argv[2:], env={{**os.environ, **shared, **own}})
processes = [start(i) for i in range(tasks)]
sys.exit(max(process.wait() for process in processes))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe, its data, and a stand-in for srun."""
    source = write_texts(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content(source)))
    srun = tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    return tmp_path


def command(folder: Path, *arguments: str) -> list[str]:
    recipe_file = str(folder / "recipe.yaml")
    return [sys.executable, "-m", "seq1f1b.cli", "train", recipe_file, *arguments]


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run(arguments: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


@pytest.mark.long
def test_srun_starts_the_tasks(folder):
    made = run(
        [
            *(str(folder / "srun"), "--ntasks=2"),
            *command(folder, "--launcher", "slurm", "--work-dir", str(folder / "run")),
        ]
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == f"wrote {folder / 'run' / 'model'}"
    assert len(losses(folder / "run")) == 6


def test_what_cannot_be_ends_with_the_key(folder):
    refused = run(command(folder))
    assert refused.returncode == 2
    assert "error: sequence_parallel_size: 2 does not divide the 1 process" in refused.stderr


def test_bad_flags_are_named(folder):
    path = str(folder / "recipe.yaml")
    launcher = CliRunner().invoke(app, ["train", path, "--launcher", "mpi"])
    assert launcher.exit_code == 2
    assert "mpi is none of none, pytorch, slurm" in launcher.output


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_bit_by_bit(folder):
    whole = run(command(folder, "--work-dir", str(folder / "whole")), NPROC_PER_NODE="2")
    assert whole.returncode == 0, whole.stderr
    killed = folder / "killed"
    process = subprocess.Popen(
        command(folder, "--work-dir", str(killed)),
        env={**os.environ, "NPROC_PER_NODE": "2"},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (killed / "checkpoints" / "step-3" / "progress.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = run(
        command(folder, "--work-dir", str(killed), "--resume", "auto"), NPROC_PER_NODE="2"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert losses(killed)[-3:] == losses(folder / "whole")[3:]


def with_deepspeed(folder: Path, name: str, changes: dict[str, Any], resume: str | None) -> None:
    init_dist("pytorch")
    train(recipe(folder / "texts.jsonl", **changes), folder / name, resume, name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_trains_alike(folder, name, workers):
    pytest.importorskip("deepspeed", reason="pip install deepspeed; tests/run.sh --all does")
    changes = {"memory.loss_tile": 16, "memory.recompute": "layers"}
    run_ranks(with_deepspeed, 2, folder, name, changes, None)
    run_ranks(by_fsdp, 2, folder, changes)
    for a, b in zip(losses(folder / name), losses(folder / "fsdp"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    (folder / name / "metrics.jsonl").unlink()
    last = folder / name / "checkpoints" / "step-6"
    last.rename(last.with_name("gone"))
    run_ranks(with_deepspeed, 2, folder, name, changes, "auto")
    for a, b in zip(losses(folder / name), losses(folder / "fsdp")[3:], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def by_fsdp(folder: Path, changes: dict[str, Any]) -> None:
    train(recipe(folder / "texts.jsonl", **changes), folder / "fsdp")


def test_without_deepspeed_the_pip_line_is_shown(folder, monkeypatch):
    import importlib.util

    from seq1f1b.ulysses.training.deepspeed_engine import read_deepspeed
    from seq1f1b.ulysses.training.recipe import RecipeError

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else real(name)
    )
    settings = recipe(folder / "texts.jsonl")
    with pytest.raises(RecipeError, match=r'pip install "deepspeed>=0.19". FSDP2 shards'):
        read_deepspeed("deepspeed_zero3", settings, 1)
    with pytest.raises(RecipeError, match=r"set memory\.cpu_offload: true"):
        read_deepspeed("deepspeed_zero3_offload", settings, 1)
