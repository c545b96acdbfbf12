"""``python tests/try_wheel.py PYTHON...``: the wheel, with the newest packages that it allows.

For each Python it makes an environment of its own, installs the wheel there, leaves this checkout
and runs the commands, a training on two ranks and the tests that need no files. It downloads some
GB, so CI does the same with the packages that it has: tests/test_packaging.py.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "distributed" / "scripts" / "plain_gpt.py"
SHAPE = ("--stages", "4", "--microbatches", "8", "--splits", "4")
AREAS = ("attention", "runtime", "schedule", "sequence", "simulate")
"""Folders of tests that need nothing of the checkout but themselves."""
TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis")
NAMES = ("torch", "megatron-core", "numpy", "transformers", "tokenizers", "huggingface-hub")
TRAINING = shlex.split(
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 3 --vocab-size 100 "
    "--train-iters 3 --eval-iters 1 --eval-interval 3 --lr 1e-3 --attention-dropout 0 "
    "--hidden-dropout 0 --log-interval 1 --position-embedding-type rope "
    "--pipeline-model-parallel-size 2 --seq1f1b-splits 3 --ckpt-format torch_dist --save-interval 3"
)


def build(folder: Path) -> Path:
    """Build the wheel into ``folder``, from a copy, since a build leaves folders in its source."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        for package in ("seq1f1b", "seq1f1b_tools", "megatron", "tests", "tools"):
            shutil.copytree(
                ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        program = (
            "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
        )
        subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            cwd=source,
            check=True,
            capture_output=True,
        )
    (path,) = folder.glob("*.whl")
    return path


def try_environment(environment: Path, folder: Path) -> dict[str, str]:
    """Run every command of the wheel in ``folder``; returns what each printed.

    Raises RuntimeError with the output of one that fails, or that does not say what it should.
    """
    python = str(environment / "bin" / "python")
    tests = _tests(folder)
    script = shutil.copy(SCRIPT, folder)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    commands = {
        "--help": ([str(environment / "bin" / "seq1f1b"), "--help"], "compare"),
        "--version": ([str(environment / "bin" / "seq1f1b"), "--version"], "0."),
        "compare": ([str(environment / "bin" / "seq1f1b"), "compare", *SHAPE], "seq1f1b-zb-h1"),
        "--list-patches": ([python, "-m", "megatron.adaptor", "--list-patches"], "pretrain"),
        "training": (
            [python, *ranks, "-m", "megatron.adaptor", script, *TRAINING, "--save", "checkpoint"],
            "validation loss",
        ),
        "tests": ([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], " passed"),
    }
    hidden = ("PYTHONPATH", "VIRTUAL_ENV")
    environ = {key: value for key, value in os.environ.items() if key not in hidden}
    printed = {}
    for name, (command, expected) in commands.items():
        run = subprocess.run(
            command,
            cwd=folder,
            env={**environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if run.returncode or expected not in run.stdout:
            raise RuntimeError(
                f"{name}: {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
            )
        printed[name] = run.stdout
    return printed


def _tests(folder: Path) -> list[str]:
    """Copy the tests that need no other files into ``folder``; returns what pytest is given."""
    (folder / "tests").mkdir()
    for name in ("conftest.py", "forks.py", "frozen.py", "workers.py", "tiny_model.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)  # pytest's settings
    for area in AREAS:
        shutil.copytree(
            ROOT / "tests" / area,
            folder / "tests" / area,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return [f"tests/{area}" for area in AREAS]


def main() -> None:
    """Try the wheel under each Python that the command line names."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        wheel = build(base)
        for number, python in enumerate(sys.argv[1:] or [sys.executable]):
            environment, folder = base / f"environment{number}", base / f"folder{number}"
            folder.mkdir()
            subprocess.run([python, "-m", "venv", str(environment)], check=True)
            pip = [str(environment / "bin" / "python"), "-m", "pip"]
            subprocess.run(
                [*pip, "install", "-q", "--no-input", str(wheel), *TEST_PACKAGES], check=True
            )
            listed = subprocess.run(
                [*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True
            ).stdout.split()
            packages = [line for line in listed if line.partition("==")[0] in NAMES]
            try_environment(environment, folder)
            print(f"{python}: works with {', '.join(packages)}", flush=True)


if __name__ == "__main__":
    main()
