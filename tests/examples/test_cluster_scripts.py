"""Scripts for clusters: every flag is accepted, every rank has a command, and two hosts meet."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.selection import mostly_long

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {"one_node.sh": 8, "many_nodes.sh": 64, "slurm.sbatch": 64}  # and their ranks


def bash(script, *flags, **environ):
    return subprocess.run(
        ["bash", EXAMPLES / script, *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=EXAMPLES.parent,
        env={**os.environ, **environ},
    )


@pytest.mark.parametrize("script", mostly_long(SCRIPTS, default=["slurm.sbatch"]))
def test_a_dry_run_accepts_every_flag_and_prints_each_ranks_command(script, tmp_path):
    num_ranks = SCRIPTS[script]
    run = bash(script, DRY_RUN="1", CHECKPOINTS=str(tmp_path / "kept"))
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"> flags accepted for {num_ranks} ranks" in run.stdout
    commands = re.findall(r"^node (\d+): RANK=(\d+) LOCAL_RANK=(\d+) .*pretrain", run.stdout, re.M)
    expected = [(rank // 8, rank, rank % 8) for rank in range(num_ranks)]
    assert [tuple(map(int, command)) for command in commands] == expected
    assert not (tmp_path / "kept").exists()


def test_a_dry_run_names_what_cannot_run():
    run = bash("one_node.sh", "--attention-dropout", "0.1", DRY_RUN="1")
    assert run.returncode != 0
    assert "--attention-dropout must be 0 with sub-sequences" in run.stderr
    assert "RANK=" not in run.stdout


def test_data_need_a_tokenizer():
    run = bash("one_node.sh", DRY_RUN="1", DATA_PATH="some/where")
    assert run.returncode != 0
    assert "a folder with tokenizer.json" in run.stderr


def test_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    scripts = [EXAMPLES / name for name in ("common.sh", *SCRIPTS)]
    run = subprocess.run(
        ["shellcheck", "-x", *scripts], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
