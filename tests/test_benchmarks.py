"""The benchmarks that GPUs are for, small and on the CPU: they run, and their tables are whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def rows_of(tmp_path, script, *arguments):
    output = tmp_path / "result"
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments), "--output", output],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    document = json.loads(output.with_suffix(".json").read_text())
    assert document["setting"]["date"]
    table = [
        line for line in output.with_suffix(".md").read_text().splitlines() if line[:2] == "| "
    ]
    assert len(table) == 1 + len(document["rows"])
    return document["rows"]


def test_attention(tmp_path):
    sizes = ("--heads", 4, "--groups", 2, "--head-size", 16, "--rounds", 1)
    rows = rows_of(tmp_path, "attention.py", *sizes, "--lengths", 64, 96, "--splits", 1, 3)
    assert [(row["length"], row["splits"]) for row in rows] == [(64, 1), (64, 3), (96, 1), (96, 3)]
    assert all(row["kernel"] == "cpu-flash" and row["over_whole"] > 0 for row in rows)


def test_host(tmp_path):
    rows = rows_of(tmp_path, "host.py", "--micro-batches", 4, "--rounds", 3)
    assert len(rows) == 3
    assert all(0 < row["us_per_action"] < 300 for row in rows)


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_stages_on_one_device(tmp_path):
    sizes = ("--layers", 2, "--length", 128, "--micro-batches", 2, "--iterations", 2)
    (row,) = rows_of(tmp_path, "one_gpu.py", "--stages", 2, *sizes)
    assert row["worst_relative_loss_difference"] < 1e-5
    assert 0 < row["first_stage_memory_over_1f1b"] < 1


def test_gpu_tables_want_a_gpu():
    run = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh"],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "finds no CUDA device" in run.stderr
