"""What the planner prints trains, and what it says at the start of training."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.training_runs import ARGUMENTS, SCRIPTS
from tests.forks import python
from tests.planner.described import describe_this_machine
from tests.selection import mostly_long

ROOT = Path(__file__).parents[2]
MODEL = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --vocab-size 100 "
    "--global-batch-size 8 --position-embedding-type rope --hidden-dropout 0"
)

pytestmark = pytest.mark.distributed


def environment(tmp_path: Path) -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    found = describe_this_machine(tmp_path / "home")
    return {**os.environ, **found, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("gpus", mostly_long([2, 4], default=[2]))
def test_the_script_of_a_plan_runs_as_it_is(tmp_path, gpus):
    plan = shlex.split(f"-m seq1f1b.cli plan --gpu this-machine --gpus {gpus} --script torchrun")
    made = subprocess.run(
        [sys.executable, *plan, *MODEL],
        capture_output=True,
        text=True,
        check=True,
        env=environment(tmp_path),
    )
    path = tmp_path / "start.sh"
    path.write_text(made.stdout)
    run = subprocess.run(
        ["bash", str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "iteration        3/       3" in run.stdout, run.stdout[-4000:]


@pytest.mark.timeout(300)
def test_training_starts_with_a_warning_and_its_own_memory(tmp_path):
    flags = shlex.split("--pipeline-model-parallel-size 2 --seq1f1b-splits 2 --vocab-size 8000")
    run = python(
        *("-m", "megatron.adaptor", SCRIPTS / "plain_gpt.py", *ARGUMENTS, *flags),
        num_ranks=2,
        environ=environment(tmp_path),
        cwd=SCRIPTS,
        with_megatron=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "makes the last stage" in run.stdout
    assert "--pipeline-model-parallel-layout" in run.stdout
    assert "Memory of stage 1 with 2 sub-sequences" in run.stdout
    assert "Theoretical memory footprints" not in run.stdout
