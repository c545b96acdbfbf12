"""What the tests of the data tools share."""

import argparse
import json
import sys

import pytest
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import _add_tokenizer_args

from tests.seq1f1b_tools.preprocess_runs import ROWS, TOOLS

# scripts find their modules beside themselves
sys.path.insert(0, str(TOOLS))

from seq1f1b_tools.preprocessing.bpe import save_tokenizer_folder, train_bpe


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    save_tokenizer_folder(train_bpe(texts, 400, len(texts)), folder)
    return folder


@pytest.fixture(scope="session")
def megatron_tokenizer(tokenizer_folder):
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_folder)]
    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(flags)
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 1, 128, 1
    return build_tokenizer(args)


@pytest.fixture
def thread_settings(monkeypatch):
    """Give back what the tool sets for the tokenizer's threads."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture
def gpt2_flags(tokenizer_folder):
    files = ["--vocab-file", tokenizer_folder / "vocab.json"]
    files += ["--merge-file", tokenizer_folder / "merges.txt"]
    return ["--tokenizer-type", "GPT2BPETokenizer", *map(str, files)]
