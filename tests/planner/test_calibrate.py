"""Measuring this machine, on shapes that take no time."""

import dataclasses
import os
import signal
import time

import pytest
import torch
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.planner.calibrate import machine
from seq1f1b.planner.calibrate.kernels import ON_HOST, Bench
from seq1f1b.planner.errors import DataFileError
from seq1f1b.planner.gpu import THIS_MACHINE, gpu
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime
from seq1f1b.planner.time import Kernels, step_time

SMALL = dataclasses.replace(
    ON_HOST,
    rows=(16, 32),
    products=((64, 64), (128, 64)),
    own=(16, 32),
    heads=((4, 4), (4, 2)),
    rounds=1,
)


@pytest.fixture(autouse=True)
def _forget():
    gpu.cache_clear()
    yield
    gpu.cache_clear()


def test_points_are_rates_of_what_was_asked():
    bench = Bench(torch.device("cpu"), torch.float32, SMALL)
    products = list(bench.products())
    assert {point[:3] for point in products} == {
        (rows, *shape) for rows in SMALL.rows for shape in SMALL.products
    }
    attention = list(bench.attention())
    assert {shape[1] // shape[0] for shape, _, _ in attention} == {0, 1, 3}
    assert all(ahead > 0 and back > 0 for _, ahead, back in attention)
    assert all(forward > 0 and back > 0 for _, forward, back in bench.elementwise())
    assert bench.launch() > 0


def test_a_calibrated_machine_plans(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ON_HOST", SMALL)
    monkeypatch.setattr(machine, "_take_cores", lambda rank, ranks: None)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["calibrate", "--ranks", "1"])
    assert result.exit_code == 0, result.output
    described = gpu(THIS_MACHINE)
    assert described.runtime == "cpu"
    assert described.kernel_curves.kind == "measured"
    options = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
        "bf16": False,
    }
    step = step_time(resolve(options), Kernels(described), runtime("cpu"))
    assert step.seconds > 0


def test_a_machine_that_was_not_measured_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(DataFileError, match="run seq1f1b calibrate"):
        gpu(THIS_MACHINE)


def test_a_description_is_a_yaml_file():
    result = CliRunner().invoke(app, ["calibrate", "--output", "machine.json"])
    assert result.exit_code == 2
    assert "must end in .yaml" in result.output


def end_rank_1(rank: int, *_: object) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


@pytest.mark.distributed
def test_a_rank_that_is_killed_ends_the_command_with_its_signal(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_run", end_rank_1)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["calibrate", "--ranks", "2"])
    assert result.exit_code == 1
    assert "rank 1 ended by signal SIGKILL" in result.output
    assert "fewer --ranks" in result.output
    assert not any(tmp_path.iterdir())


def test_a_description_that_cannot_be_written_is_refused_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "calibrate", lambda ranks: pytest.fail("it has measured"))
    (tmp_path / "file").touch()
    arguments = ["calibrate", "--output", str(tmp_path / "file/new.yaml")]
    result = CliRunner(env={"COLUMNS": "500"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert "--output" in result.output
    assert "file is not a folder" in result.output
