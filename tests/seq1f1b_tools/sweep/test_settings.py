"""The environment variables of a sweep, and the plan that they make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seq1f1b_tools.sweep.corpus import Corpus
from seq1f1b_tools.sweep.main import main
from seq1f1b_tools.sweep.plan import plan_runs, training_arguments, why_not
from seq1f1b_tools.sweep.settings import (
    ROOT,
    VARIABLES,
    SettingsError,
    help_text,
    misspelled,
    read_settings,
)
from tests.seq1f1b_tools.sweep.bench import AVERAGE, BASELINE, UNIFORM


def faults(environ: dict[str, str], num_gpus: int = 0) -> str:
    with pytest.raises(SettingsError) as caught:
        read_settings(environ, num_gpus)
    return str(caught.value)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("MODEL_SIZES", "tiny 8b", "'8b' is not one of tiny, tiny-deep, 1.3b, 2.7b, 7b, 13b, 30b"),
        ("SEQ_LENGTHS", "4k", "'4k' is not a whole number from 1 up"),
        ("MICRO_BATCHES", "0", "'0' is not a whole number from 1 up"),
        ("SPLITS", "-1", "'-1' is not a whole number from 1 up"),
        ("SPLITS", ",", "there is no value in it"),
        ("BALANCE_METHODS", "even", "'even' is not one of average, uniform_comp"),
        ("MULTIPLE", "0", "'0' is not a whole number from 1 up"),
        ("VPP_SIZES", "1.5", "'1.5' is not a whole number from 1 up"),
        ("TP", "two", "'two' is not a whole number from 1 up"),
        ("PP", "0", "'0' is not a whole number from 1 up"),
        ("TRAIN_ITERS", "1 2 3", "give one number, or 2 of them, one for each of MICRO_BATCHES"),
        ("WARMUP_ITERS", "12", r"must be below TRAIN_ITERS (12)"),
        ("DATASET", "c4", "'c4' is not one of stdlib, codeparrot"),
        ("VOCAB_SIZE", "100", "'100' is not a whole number from 257 up"),
        ("CORPUS_MB", "inf", "'inf' is not a number above 0"),
        ("EXTRA_ARGS", "--a 'b", "cannot be split into words: No closing quotation"),
        ("RUN_TIMEOUT", "-3", "'-3' is not a number above 0"),
        ("RETRY_FAILED", "yes", "'yes' is not one of 0, 1"),
        ("TAKE_TURNS", "no", "'no' is not one of 0, 1"),
        ("NNODES", "0", "'0' is not a whole number from 1 up"),
        ("OUTPUT", "~nosuchuser/x", "there is no such home folder"),
        ("DATA", "~nosuchuser", "there is no such home folder"),
        ("TP", "1" * 5000, "is too large"),
        ("CORPUS_MB", "1e400", "'1e400' is not a number above 0"),
        ("RUN_TIMEOUT", "nan", "'nan' is not a number above 0"),
        ("MASTER_PORT", "80", "'80' is not a port from 1024 to 65534"),
    ],
)
def test_bad_values_are_named(name, value, message):
    text = faults({name: value})
    assert text.startswith(f"{name}={value:.99}") or name == "TRAIN_ITERS"
    assert message in text


def test_a_dry_run_lists_runs_and_commands_and_starts_none(bench, capsys):
    environ = bench.environ(DRY_RUN="1", SPLITS="1 4 65", EXTRA_ARGS="--swiglu")
    assert main([], environ, num_gpus=0) == 0
    listed = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in listed if not line.startswith(" ")]
    assert names[:3] == [BASELINE, AVERAGE, UNIFORM]
    assert "4 iterations, bubble 11.1%, 1.33x of 1F1B in theory" in listed[4]
    commands = [line.split() for line in listed if line.startswith(" ")]
    assert len(commands) == 3  # 65 sub-sequences of 64 tokens cannot be
    assert sum("skipped, " in line for line in listed) == 2
    for command, splits in zip(commands, ("1", "4", "4"), strict=True):
        assert command[command.index("--seq1f1b-splits") + 1] == splits
        assert command[-1] == "--swiglu"
        assert ROOT / "pretrain_gpt.py" in map(Path, command)
    assert not bench.output.exists()
    assert main([], bench.environ(DRY_RUN="1", SPLITS="65"), num_gpus=0) == 2


def test_all_bad_values_are_listed_at_once_before_anything_runs(bench, capsys):
    environ = bench.environ(SPLITS="0", TP="x", NNODES="2", NODE_RANK="2", TAKE_TURNS="1")
    assert main([], environ, num_gpus=0) == 2
    text = capsys.readouterr().err
    for name in ("SPLITS=0", "TP=x", "NODE_RANK=2", "MASTER_ADDR: must be set", "TAKE_TURNS=1: "):
        assert name in text
    assert not bench.output.exists()


def test_a_misspelled_variable_is_named(bench, capsys):
    typos = {"MODEL_SIZE": "2.7b", "SEQ_LENGHTS": "64"}
    assert main([], bench.environ(DRY_RUN="1", **typos), num_gpus=0) == 0
    assert capsys.readouterr().err.splitlines() == [
        "exp.sh: warning: MODEL_SIZE is no setting; did you mean MODEL_SIZES?",
        "exp.sh: warning: SEQ_LENGHTS is no setting; did you mean SEQ_LENGTHS?",
    ]
    usual = ("HOME", "PATH", "MASTER_ADDRESS_FILE", "TMPDIR", "DATE", "TPU", "SLURM_NNODES")
    assert not list(misspelled(dict.fromkeys(usual, "1")))


def test_more_gpus_than_there_are_is_refused():
    assert "GPUS_PER_NODE=8: this node has 4" in faults({"GPUS_PER_NODE": "8"}, num_gpus=4)


@pytest.mark.parametrize("num_gpus,pp", [(8, 8), (16, 8), (6, 2), (4, 4), (1, 1)])
def test_gpu_defaults_fit_the_gpus(num_gpus, pp):
    settings = read_settings({}, num_gpus)
    assert settings.model_sizes == ("2.7b",)
    assert settings.pp == (pp,)
    runs = plan_runs(settings)
    assert not [reason for run in runs if (reason := why_not(run, settings))]
    assert {run.num_processes for run in runs} == {num_gpus}
    assert runs[0].global_batch_size == runs[0].num_micro_batches * num_gpus // pp


def test_help_lists_every_variable_with_its_defaults():
    lines = help_text().splitlines()
    for variable in VARIABLES:
        line = next(line for line in lines if line.startswith(f"{variable.name} "))
        assert variable.cpu in line
        assert variable.gpu in line


def test_help_needs_nothing_installed():
    command = [sys.executable, "-I", "-S", str(ROOT / "seq1f1b_tools" / "sweep"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "MODEL_SIZES" in done.stdout


def slurm(tmp_path: Path, **variables: str) -> dict[str, str]:
    return {"SLURM_NNODES": "3", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[4-6]", **variables}


def test_slurm_is_read(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "gpu[4-6]" ] && printf "gpu4\\ngpu5\\ngpu6\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = read_settings(slurm(tmp_path), num_gpus=8).cluster
    assert (cluster.num_nodes, cluster.node_rank, cluster.master_addr) == (3, 1, "gpu4")
    chosen = read_settings(slurm(tmp_path, MASTER_ADDR="10.0.0.1"), num_gpus=8).cluster
    assert chosen.master_addr == "10.0.0.1"
    assert read_settings(slurm(tmp_path, NNODES="1"), num_gpus=8).cluster.num_nodes == 1
    assert "SLURM_LOCALID=1" in faults(slurm(tmp_path, SLURM_LOCALID="1"))
    assert "scontrol cannot expand it" in faults(slurm(tmp_path, SLURM_JOB_NODELIST="x"))


@pytest.mark.parametrize("name", ["SLURM_NNODES", "SLURM_LOCALID", "SLURM_NODEID"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 5000, "²"])
def test_slurms_numbers_are_numbers(tmp_path, name, value):
    assert f"{name}={value:.99}: is not a number" in faults(slurm(tmp_path, **{name: value}))


def test_slurm_without_scontrol_asks_for_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol, which expands it, is not on the PATH" in faults(slurm(tmp_path))


HEAD = "3 layers and 1 for the output layer"


def reasons(num_gpus: int = 0, **variables: str) -> dict[str, str]:
    settings = read_settings(variables, num_gpus)
    return {run.variant: why_not(run, settings) for run in plan_runs(settings)}


@pytest.mark.parametrize(
    "num_gpus,variables,reason",
    [
        (0, {"PP": "3"}, f"{HEAD} cannot be dealt to PP 3 x VPP 1 evenly"),
        (0, {"TP": "3"}, "4 attention heads are not divisible by TP 3"),
        (0, {"PP": "1", "VPP_SIZES": "2"}, "VPP 2 needs PP 2 or more"),
        (0, {"NNODES": "4", "MASTER_ADDR": "a"}, "2 processes cannot be dealt to 4 nodes evenly"),
        (8, {"PP": "3"}, "TP 1 x PP 3 does not divide 8 processes"),
    ],
)
def test_impossible_parallelism_is_skipped(num_gpus, variables, reason):
    assert set(reasons(num_gpus, MICRO_BATCHES="2", **variables).values()) == {reason}


@pytest.mark.parametrize("variables,multiple", [({}, 1), ({"MULTIPLE": "64"}, 64)])
def test_lengths_are_cut_in_the_blocks_that_were_asked_for(variables, multiple):
    runs = plan_runs(read_settings(variables, num_gpus=0))
    found = {run.num_splits > 1: run.multiple for run in runs}
    assert found == {False: 1, True: multiple}


def test_blocks_that_do_not_fit_are_skipped():
    found = reasons(MULTIPLE="3000", MICRO_BATCHES="2")
    assert found.pop("1f1b") == ""
    for reason in found.values():
        assert reason.startswith("sequence length 4096 is not a multiple of 3000")


def test_steps_without_end_are_skipped():
    found = reasons(MICRO_BATCHES="99999999")
    assert found.pop("1f1b") == ""
    assert set(found.values()) == {"799,999,992 forwards in a step are more than 1,000,000"}


def test_megatrons_interleaved_loop_needs_whole_rounds_of_micro_batches():
    found = reasons(MODEL_SIZES="tiny-deep", MICRO_BATCHES="3", VPP_SIZES="1 2")
    assert found["1f1b"] == ""
    assert "multiples of PP 2" in found["1f1b-interleaved-v2"]


def test_every_baseline_comes_before_what_is_compared_with_it():
    settings = read_settings({"SPLITS": "4 2 1", "VPP_SIZES": "2 1"}, num_gpus=0)
    runs = plan_runs(settings)
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 5
    seen = set()
    for run in runs:
        assert run.is_baseline or run.setting in seen
        seen.add(run.setting)


@pytest.mark.parametrize(
    "pp, chunks, layout",
    [("2", "1", "Ett|tL"), ("2", "2", "Et|t|t|L"), ("4", "1", "Et|t|t|L"), ("1", "1", None)],
)
def test_the_output_layer_counts_as_a_layer_of_tiny(tmp_path, pp, chunks, layout):
    settings = read_settings({"PP": pp, "VPP_SIZES": chunks, "MICRO_BATCHES": "4"}, num_gpus=0)
    for run in plan_runs(settings):
        assert not why_not(run, settings)
        words = training_arguments(run, Corpus.of(settings), settings, tmp_path / "metrics")
        flag = "--pipeline-model-parallel-layout"
        assert (words[words.index(flag) + 1] if flag in words else None) == layout
