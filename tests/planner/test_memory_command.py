"""``seq1f1b memory``, as a person types it."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from seq1f1b.cli import app
from tests.forks import python

SETTING = shlex.split(
    "--num-layers 16 --hidden-size 1024 --num-attention-heads 8 --seq-length 16384 "
    "--global-batch-size 8 --pipeline-model-parallel-size 4 --tensor-model-parallel-size 2 "
    "--sequence-parallel --position-embedding-type rope --hidden-dropout 0"
)


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["memory", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_json_has_every_stage_and_nothing_else_is_printed():
    figures = json.loads(run(*SETTING, "--schedule", "seq1f1b", "--json", "--lr", "1e-4"))
    assert figures["schedule"] == "seq1f1b"
    assert figures["gpus"] == 8
    assert len(figures["stages"]) == 4
    for stage in figures["stages"]:
        assert 0 < stage["allocated_gib"] <= stage["reserved_gib"]
    assert figures["peak_reserved_gib"] == max(s["reserved_gib"] for s in figures["stages"])
    assert figures["limit_gib"] is None
    assert "--seq1f1b-splits 4" in figures["assumed"]
    assert figures["without_effect"] == ["--lr"]


@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "1f1b-interleaved", "zb-h1", "seq1f1b", "seq1f1b-interleaved"]
)
def test_every_schedule_has_its_memory(schedule):
    figures = json.loads(run(*SETTING, "--schedule", schedule, "--json"))
    assert figures["schedule"] == schedule


def test_the_table_says_whether_it_fits_and_how_much_is_missing():
    small = run(*SETTING, "--no-megatron", "--gpu", "a100-80g")
    assert "fits" in small
    assert "to spare" in small
    assert "GiB missing" in run(
        *SETTING[:-1], "0", "--no-megatron", "--gpu", "rtx-4090", "--seq-length", "131072"
    )
    assert "no limit: name a GPU with --gpu" in run(*SETTING, "--no-megatron")


def test_the_runtime_changes_the_figures():
    old, new = (
        json.loads(run(*SETTING, "--schedule", "seq1f1b", "--json", "--runtime", name))
        for name in ("megatron-2023", "current")
    )
    assert old["peak_reserved_gib"] > new["peak_reserved_gib"]


def test_more_gpus_shard_the_optimizer():
    one, many = (
        json.loads(run(*SETTING, "--use-distributed-optimizer", "--json", "--gpus", gpus))
        for gpus in ("8", "64")
    )
    assert one["stages"][0]["static_gib"] > 2 * many["stages"][0]["static_gib"]


def test_a_model_by_name_is_changed_by_options():
    figures = json.loads(
        run(
            "--model",
            "llama-3-8b",
            "--seq-length",
            "8192",
            "--num-layers",
            "4",
            "--pipeline-model-parallel-size",
            "2",
            "--json",
        )
    )
    assert len(figures["stages"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-layers", "3"], "--hidden-size: required"),
        ([*SETTING, "--pipeline-model-parallel-size", "3"], "cannot be dealt evenly"),
        ([*SETTING, "--gpus", "7"], "--gpus 7: not a multiple of 8"),
        ([*SETTING, "--gpu", "a1000"], "a1000: there is no such description"),
        ([*SETTING, "--model", "llama"], "llama: there is no such description"),
        ([*SETTING, "--sequence-paralel"], "did you mean --sequence-parallel?"),
    ],
)
def test_faults_are_listed_and_nothing_is_printed_on_stdout(arguments, message):
    result = CliRunner().invoke(app, ["memory", *arguments, "--json"])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_help_lists_megatrons_options():
    result = CliRunner().invoke(app, ["memory", "--help"], env={"COLUMNS": "200"})
    for flag in ("--num-layers", "--recompute-modules", "--gpu", "--runtime", "--seq1f1b-splits"):
        assert flag in result.output


def test_megatrons_own_estimate_stands_beside_it():
    command = ("-m", "seq1f1b.cli", "memory", *SETTING, "--json", "--megatron")
    estimates = []
    for schedule in ("1f1b", "seq1f1b"):  # whose sub-sequences Megatron's formulas do not know
        done = python(*command, "--schedule", schedule)
        assert done.returncode == 0, done.stderr[-2000:]
        estimates.append(json.loads(done.stdout)["megatron_gib"])
    assert estimates[0] == estimates[1]
    estimate = estimates[0]
    assert estimate["total"] > estimate["total_with_sequence_parallel"] > estimate["weights"]
    assert estimate["total"] == pytest.approx(estimate["weights"] + estimate["activations"])
