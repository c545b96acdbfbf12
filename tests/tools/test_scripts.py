"""The scripts under Megatron's names, beside another package of the name ``tools``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def beside_other_tools(tmp_path):
    """An environment as beside a checkout of Megatron-LM, whose ``tools`` is a package."""
    for package in ("tools", "tools/checkpoint", "checkpoint", "preprocessing", "sweep"):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text(f"raise ImportError('other {package}')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    "command,shown",
    [
        (["bash", "exp.sh", "--help"], "MODEL_SIZES"),
        ([sys.executable, "tools/checkpoint/convert.py", "--help"], "hf-to-megatron"),
        ([sys.executable, "tools/preprocess_data.py", "--help"], "--json-keys"),
        ([sys.executable, "tools/make_corpus.py", "--help"], "--vocab-size"),
        ([sys.executable, "seq1f1b_tools/sweep", "--help"], "MODEL_SIZES"),
    ],
)
@pytest.mark.parametrize("safe_path", ["", "1"])
def test_help_beside_another_tools_package(beside_other_tools, tmp_path, command, shown, safe_path):
    command = [str(ROOT / word) if "/" in word or word == "exp.sh" else word for word in command]
    environ = beside_other_tools | ({"PYTHONSAFEPATH": safe_path} if safe_path else {})
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environ
    )
    assert run.returncode == 0, run.stderr
    assert shown in run.stdout


def test_the_sweep_starts_beside_another_tools_package(beside_other_tools, tmp_path):
    command = [sys.executable, ROOT / "seq1f1b_tools" / "sweep"]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=beside_other_tools | {"SPLITS": "0"},
    )
    assert run.returncode == 2, run.stderr
    assert "SPLITS=0: '0' is not a whole number from 1 up" in run.stderr
