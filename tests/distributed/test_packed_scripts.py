"""pretrain_gpt.py on packed documents: cut into sub-sequences it trains as it does whole."""

import json
import shlex
from pathlib import Path

import pytest

from tests.distributed.training_runs import run_ranks
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

SCRIPT = Path(__file__).parents[2] / "pretrain_gpt.py"
MODEL = shlex.split(
    "--num-layers 4 --hidden-size 16 --num-attention-heads 2 --global-batch-size 4 --train-iters 2 "
    "--eval-iters 1 --eval-interval 2 --lr 1e-3 --attention-dropout 0 --hidden-dropout 0 "
    "--log-interval 1 --position-embedding-type rope --transformer-impl local "
    "--no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-rope-fusion "
    "--split 8,1,1"
)
# Megatron's mock documents have 2048 tokens on average.
MOCK = shlex.split(
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 100 --seq-length 2048 "
    "--max-position-embeddings 2048 --micro-batch-size 1"
)
PIPELINE = shlex.split("--pipeline-model-parallel-size 4")
BOTH = shlex.split("--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2")


def losses(tmp_path: Path, *flags: object) -> list[float]:
    file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    run = run_ranks(4, SCRIPT, *MODEL, *flags, "--seq1f1b-metrics-file", file)
    assert run.returncode == 0, run.stderr[-12000:]
    assert "validation loss" in run.stdout
    return [json.loads(line)["lm_loss"] for line in file.read_text().splitlines()]


def conversations(folder: Path) -> list[object]:
    """Write a tokenizer and packed conversations; return the flags that read them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [f"count to {n}: {' '.join(map(str, range(n)))}" for n in range(40)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(folder / "tokenizer")
    with open(folder / "chats.jsonl", "w") as file:
        for n in range(40):
            messages = [
                {"role": role, "content": text}
                for i in range(1 + n % 4)
                for role, text in (
                    ("system", "be brief"),
                    ("user", f"count to {n + i}"),
                    ("assistant", texts[(n + i) % 40]),
                )
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return [
        *("--sft", "--data-path", folder / "chats.jsonl"),
        *("--tokenizer-type", "SFTTokenizer", "--tokenizer-model", folder / "tokenizer"),
        *("--sft-tokenizer-prompt-format", "default", "--seq-length", 160),
        *("--max-position-embeddings", 160, "--micro-batch-size", 2),
    ]


def test_middle_stages_without_data(tmp_path):
    layout = ["--pipeline-model-parallel-layout", "Et|tt|t|L"]
    flags = [*MOCK, *PIPELINE, *layout, "--reset-attention-mask"]
    whole = losses(tmp_path, *flags, "--seq1f1b-splits", 1)
    cut = losses(tmp_path, *flags, "--reset-position-ids", "--seq1f1b-splits", 3)
    assert cut == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "data", mostly_long(["pretraining", "conversations"], default=["conversations"])
)
def test_samples_with_cumulative_lengths(tmp_path, data):
    flags = [*MOCK, "--dataloader-inter-document-masking"]
    if data == "conversations":
        flags = conversations(tmp_path)
    whole = losses(tmp_path, *flags, *BOTH, "--seq1f1b-splits", 1)
    cut = losses(tmp_path, *flags, *BOTH, "--seq1f1b-splits", 4)
    assert cut == pytest.approx(whole, rel=1e-5)
