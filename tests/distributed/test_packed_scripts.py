"""pretrain_gpt.py on packed documents: every way to ask for them, the same losses."""

import json
import shlex
from pathlib import Path

import pytest

from tests.distributed.test_scripts import torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[2] / "pretrain_gpt.py"
# Megatron's mock documents have 2048 tokens on average.
ARGUMENTS = shlex.split(
    "--num-layers 4 --hidden-size 16 --num-attention-heads 2 --seq-length 2048 "
    "--max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 4 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 100 --train-iters 2 --eval-iters 1 "
    "--eval-interval 2 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 --log-interval 1 "
    "--position-embedding-type rope --transformer-impl local --no-persist-layer-norm "
    "--no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion --split 8,1,1"
)


PIPELINE = "--pipeline-model-parallel-size 4"
BOTH = "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2"


def losses(tmp_path: Path, *flags: str) -> list[float]:
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    arguments = shlex.split(" ".join(flags))
    run = torchrun(4, SCRIPT, *ARGUMENTS, *arguments, "--seq1f1b-metrics-file", file)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "validation loss" in run.stdout
    return [json.loads(line)["lm_loss"] for line in file.read_text().splitlines()]


def test_middle_stages_without_data(tmp_path):
    whole = losses(tmp_path, PIPELINE, "--reset-attention-mask --seq1f1b-splits 1")
    cut = losses(
        tmp_path, PIPELINE, "--reset-attention-mask --reset-position-ids --seq1f1b-splits 3"
    )
    assert cut == pytest.approx(whole, rel=1e-5)
    assert losses(tmp_path, PIPELINE, "--seq1f1b-splits 3") != pytest.approx(whole, rel=1e-4)


def test_samples_with_cumulative_lengths(tmp_path):
    whole = losses(tmp_path, BOTH, "--dataloader-inter-document-masking --seq1f1b-splits 1")
    cut = losses(tmp_path, BOTH, "--dataloader-inter-document-masking --seq1f1b-splits 4")
    assert cut == pytest.approx(whole, rel=1e-5)
