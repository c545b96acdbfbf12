"""The commands by which people find the flags, and what replaces the command line."""

from pathlib import Path

from tests.forks import python

ROOT = Path(__file__).parents[2]


def test_help_lists_the_flags():
    run = python("pretrain_gpt.py", "--help", cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    for flag in ("--seq1f1b-splits", "--seq1f1b-verify", "--tensor-model-parallel-size"):
        assert flag in run.stdout


def test_patches_are_listed_without_a_gpu():
    run = python("-m", "megatron.adaptor", "--list-patches", cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.splitlines()
    targets, reasons = lines[::2], lines[1::2]
    assert "megatron.core.pipeline_parallel.schedules:get_forward_backward_func" in targets
    assert all(target.startswith("megatron.") for target in targets)
    assert all(reason.startswith("    ") and reason.endswith(".") for reason in reasons)


def test_a_yaml_file_of_arguments_is_refused(tmp_path):
    file = tmp_path / "arguments.yaml"
    file.write_text("num_layers: 4\n")
    run = python("pretrain_gpt.py", "--yaml-cfg", file, cwd=ROOT)
    assert run.returncode == 1
    assert f"--yaml-cfg {file} replaces every argument" in run.stderr
    assert "Traceback" not in run.stderr
