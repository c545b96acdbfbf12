"""Training scripts run as users run them, in processes of their own."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from seq1f1b.processes import end_with_parent
from tests.forks import python

SCRIPTS = Path(__file__).parent / "scripts"
ARGUMENTS = shlex.split(
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 3 --vocab-size 100 "
    "--train-iters 4 --eval-iters 1 --eval-interval 4 --lr 1e-3 --attention-dropout 0 "
    "--hidden-dropout 0 --log-interval 1 --position-embedding-type rope"
)


def torchrun(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_ranks), *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=SCRIPTS,
        preexec_fn=lambda: end_with_parent(number=signal.SIGTERM),  # which torchrun passes on
    )


def run_ranks(
    num_ranks: int, *arguments: object, with_megatron: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script as torchrun does, but in forks.

    with_megatron: of a process that has installed the adaptor and imported Megatron.
    """
    return python(*arguments, num_ranks=num_ranks, cwd=SCRIPTS, with_megatron=with_megatron)


def train(tmp_path: Path, num_ranks: int, *flags: object) -> list[dict]:
    """Run plain_gpt.py and return what each iteration logged."""
    file = tmp_path / "metrics.jsonl"
    file.unlink(missing_ok=True)
    run = run_ranks(
        num_ranks,
        *("-m", "megatron.adaptor", SCRIPTS / "plain_gpt.py", *ARGUMENTS, *flags),
        *("--seq1f1b-metrics-file", file),
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "validation loss" in run.stdout
    return [json.loads(line) for line in file.read_text().splitlines()]
