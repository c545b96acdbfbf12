"""tools/preprocess_data.py against a slow reference that follows upstream's tool step by step."""

import argparse
import gzip
import json
import os
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import _add_tokenizer_args

from seq1f1b_tools.preprocessing.indexed import EncodedDocuments, IndexedWriter, token_dtype
from seq1f1b_tools.preprocessing.sentences import sentence_splitter
from tests.forks import python
from tests.seq1f1b_tools.preprocess_runs import (
    ROWS,
    TOOLS,
    command,
    pair,
    reference,
    run,
    write_jsonl,
)

pytestmark = pytest.mark.usefixtures("thread_settings")


@pytest.mark.parametrize(
    "append_eod,partitions,chunk_size",
    [(False, 1, 1), (True, 1, None), (True, 3, 5)],
)
def test_bytes_are_upstreams(
    tmp_path, gpt2_flags, megatron_tokenizer, append_eod, partitions, chunk_size
):
    rows = ROWS * 3
    flags = ["--append-eod"] if append_eod else []
    flags += ["--chunk-size", chunk_size] if chunk_size else []
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    code = run(
        "--input", source, "--json-keys", "content", "title", "--output-prefix", tmp_path / "out/x",
        "--workers", 3, "--partitions", partitions, "--dataset-impl", "mmap", *gpt2_flags, *flags,
    )  # fmt: skip
    assert code == 0
    for key in ("content", "title"):
        expected = reference(
            tmp_path / key,
            rows,
            key,
            megatron_tokenizer,
            append_eod=append_eod,
            partitions=partitions,
        )
        assert pair(tmp_path / f"out/x_{key}_document") == expected
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_order_is_kept_when_asked_for(tmp_path, gpt2_flags, megatron_tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--json-keys", "content", "--partitions", 3, "--keep-sequential-samples", *gpt2_flags]
    assert run("--input", source, "--output-prefix", tmp_path / "x", *flags) == 0
    expected = reference(tmp_path / "ref", ROWS, "content", megatron_tokenizer)
    assert pair(tmp_path / "x_content_document") == expected


def test_globs_and_gz(tmp_path, gpt2_flags, megatron_tokenizer):
    write_jsonl(tmp_path / "b.jsonl", ROWS[:3])
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS[3:6])
    (tmp_path / "c.jsonl").write_bytes(json.dumps(ROWS[6]).encode())  # no newline at the end
    flags = ["--json-keys", "content", "--vocab", gpt2_flags[3], *gpt2_flags[:2], *gpt2_flags[4:]]
    assert run("--input", tmp_path / "*.jsonl*", "--output-prefix", tmp_path / "x", *flags) == 0
    rows = ROWS[3:6] + ROWS[:3] + ROWS[6:7]
    expected = reference(tmp_path / "ref", rows, "content", megatron_tokenizer)
    assert pair(tmp_path / "x_content_document") == expected


def test_hugging_face_folder_gives_the_same(tmp_path, tokenizer_folder, gpt2_flags):
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--input", source, "--json-keys", "content", "--append-eod"]
    assert run(*flags, *gpt2_flags, "--output-prefix", tmp_path / "x") == 0
    model = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_folder]
    assert run(*flags, *model, "--output-prefix", tmp_path / "y") == 0
    assert pair(tmp_path / "x_content_document") == pair(tmp_path / "y_content_document")


def test_hugging_face_tokenizer_that_adds_tokens_and_truncates(tmp_path, tokenizer_folder):
    from tokenizers import Tokenizer, processors

    folder = tmp_path / "adding"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(flags)
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 1, 128, 1
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags += ["--json-keys", "content", "--append-eod", "--output-prefix", tmp_path / "x"]
    assert run("--input", source, *flags) == 0
    expected = reference(tmp_path / "ref", ROWS, "content", build_tokenizer(args), append_eod=True)
    assert pair(tmp_path / "x_content_document") == expected
    assert len(IndexedDataset(str(tmp_path / "x_content_document"))[0]) > 5


def test_a_training_run_reads_back_the_text(tmp_path, gpt2_flags, megatron_tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", [ROWS[0], ROWS[2]])
    flags = ["--json-keys", "content", "--append-eod", *gpt2_flags]
    assert run("--input", source, "--output-prefix", tmp_path / "x", *flags) == 0
    dataset = IndexedDataset(str(tmp_path / "x_content_document"))
    assert len(dataset) == 2
    for sequence, row in zip(dataset[:], [ROWS[0], ROWS[2]], strict=True):
        *ids, last = sequence.tolist()
        assert last == megatron_tokenizer.eod
        assert megatron_tokenizer.detokenize(ids) == row["content"]


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentences(tmp_path, gpt2_flags, megatron_tokenizer, monkeypatch, keep_newlines):
    model = tmp_path / "nltk/tokenizers/punkt_tab/english"
    model.mkdir(parents=True)
    (model / "abbrev_types.txt").write_text("mr\ne.g\n")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (model / name).write_text("")
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--split-sentences", "--append-eod", "--json-keys", "content", "--workers", 2]
    flags += ["--keep-newlines"] if keep_newlines else []
    done = subprocess.run(
        command("--input", source, "--output-prefix", tmp_path / "x", *flags, *gpt2_flags),
        env=os.environ | {"NLTK_DATA": str(tmp_path / "nltk")},
        check=False,
    )
    assert done.returncode == 0
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk")])
    split = sentence_splitter("english", keep_newlines)
    sentences = split(ROWS[-1]["content"])
    assert [sentence.strip() for sentence in sentences] == [
        "Mr. Smith saw 3.14 ships.", "Did he?", "Yes!"
    ]  # fmt: skip
    assert (sentences[0].endswith("\n\n")) is keep_newlines
    expected = reference(
        tmp_path / "ref", ROWS, "content", megatron_tokenizer, append_eod=True, split=split
    )
    assert pair(tmp_path / "x_content_sentence") == expected


def test_a_tokenizer_of_megatrons_own(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "1 2 3"}, {"text": "69999"}])
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "1"}, {"text": "words"}])
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "70000", "--append-eod"]
    flags += ["--workers", "2", "--output-prefix", str(tmp_path / "out/x"), "--input"]
    # one process for both: importing Megatron takes longer than all the rest
    code = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); from preprocess_data import main; "
        f"sys.exit(10 * main({[*flags, str(good)]}) + main({[*flags, str(bad)]}))"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert f"between {bad}:1 and {bad}:2 cannot be tokenized: ValueError" in done.stderr
    dataset = IndexedDataset(str(tmp_path / "out/x_text_document"))
    assert dataset.index.dtype == np.int32
    assert [sequence.tolist()[:-1] for sequence in dataset[:]] == [[1, 2, 3], [69999]]
    assert len(list((tmp_path / "out").iterdir())) == 2


documents_of_ids = st.lists(st.lists(st.lists(st.integers(0, 60000), min_size=1)), min_size=1)


@given(documents_of_ids, st.integers(1, 4), st.sampled_from([60001, 65499, 65500]))
@settings(max_examples=50, deadline=None)
def test_writer_against_megatrons_builder(tmp_path_factory, documents, partitions, vocab_size):
    folder = tmp_path_factory.mktemp("writer")
    dtype = token_dtype(vocab_size)
    writer = IndexedWriter(str(folder / "x"), dtype, partitions)
    half = len(documents) // 2
    for part in (documents[:half], documents[half:]):
        sequences = [ids for document in part for ids in document]
        tokens = np.array([token for ids in sequences for token in ids], dtype=dtype)
        writer.add(EncodedDocuments(tokens, list(map(len, sequences)), list(map(len, part))))
    writer.finish()
    writer.publish()
    builder = IndexedDatasetBuilder(f"{folder}/y.bin", DType.optimal_dtype(vocab_size))
    for first in range(partitions):
        for document in documents[first::partitions]:
            ids = [token for sequence in document for token in sequence]
            builder.add_document(ids, list(map(len, document)))
    builder.finalize(f"{folder}/y.idx")
    assert pair(folder / "x") == pair(folder / "y")
    assert sorted(path.name for path in folder.iterdir()) == ["x.bin", "x.idx", "y.bin", "y.idx"]
