"""tools/make_corpus.py: the standard library, the hub's shape, and a tokenizer for both."""

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import _add_tokenizer_args

from seq1f1b_tools.preprocessing import documents
from seq1f1b_tools.preprocessing.bpe import load_gpt2_bpe
from tests.seq1f1b_tools.preprocess_runs import TOOLS

pytestmark = pytest.mark.usefixtures("thread_settings")


def run(*flags):
    import make_corpus

    return make_corpus.main([str(flag) for flag in flags])


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def small(tmp_path):
    return ["--size-mb", 0.3, "--vocab-size", 320, "--output-dir", tmp_path / "data"]


def test_standard_library(tmp_path, small):
    assert run(*small) == 0
    lines = (tmp_path / "data/corpus.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    root = documents.standard_library_root()
    assert all((root / row["path"]).is_file() for row in rows)
    size = sum(len(row["content"].encode()) for row in rows)
    assert size - len(rows[-1]["content"].encode()) < 300_000 <= size


def test_tokenizer_serves_megatron_and_gpt2_alike(tmp_path, small):
    assert run(*small) == 0
    folder = tmp_path / "data/tokenizer"
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]
    args = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(flags)
    args.rank, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size = 1, 128, 1
    megatron = build_tokenizer(args)
    gpt2 = load_gpt2_bpe(str(folder / "vocab.json"), str(folder / "merges.txt"))
    vocab = json.loads((folder / "vocab.json").read_text())
    assert megatron.vocab_size == gpt2.get_vocab_size() == len(vocab) == 320
    assert megatron.eod == vocab["<|endoftext|>"]
    text = "def grüße(x):\n\treturn '漢字🙂\x00' <|endoftext|>  # done\n"
    ids = megatron.tokenize(text)
    assert ids == gpt2.encode(text).ids
    assert ids.count(megatron.eod) == 1
    assert megatron.detokenize(ids) == text
    assert len(ids) < len(text.encode()) / 1.2


def test_same_flags_same_bytes_and_nothing_done_twice(tmp_path, small, capsys):
    assert run(*small) == 0
    first = contents(tmp_path / "data")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    capsys.readouterr()
    assert run(*small) == 0
    assert capsys.readouterr().err.count("up to date") == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == times
    assert run(*small, "--output-dir", tmp_path / "again") == 0
    assert contents(tmp_path / "again") == first


def test_what_changed_is_made_again(tmp_path, small, capsys):
    assert run(*small) == 0
    corpus = tmp_path / "data/corpus.jsonl"
    made = corpus.stat().st_mtime_ns
    assert run(*small, "--vocab-size", 300) == 0
    assert corpus.stat().st_mtime_ns == made
    assert len(json.loads((tmp_path / "data/tokenizer/vocab.json").read_text())) == 300
    (tmp_path / "data/tokenizer/merges.txt").unlink()
    assert run(*small, "--vocab-size", 300) == 0
    assert (tmp_path / "data/tokenizer/merges.txt").is_file()
    with open(corpus, "a") as file:
        file.write("damage")
    assert run(*small, "--size-mb", 0.3) == 0
    assert not corpus.read_text().endswith("damage")


def test_broken_files_are_left_out(tmp_path):
    files = {
        "b.py": b"x = 1\n",
        "a/__init__.py": b"",
        "a/latin.py": b"# coding: latin-1\nname = '\xe9'\n",
        "test/bad_utf8.py": b"x = '\xff'\n",
        "test/bad_coding.py": b"# coding: unheard-of\n",
        "lib2to3/tests/data/py2.py": b"print 'x'\n",
        "test/test_good.py": b"assert True\n",
        "site-packages/other.py": b"y = 2\n",
        "notes.txt": b"no source",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text)
    rows = list(documents.standard_library_rows(tmp_path))
    assert [row["path"] for row in rows] == ["a/latin.py", "b.py", "test/test_good.py"]
    assert rows[0]["content"].endswith("name = 'é'\n")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set in codeparrot's shape that needs no network: 3 files of 40 documents."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for number in range(3):
        rows = (
            {
                "repo_name": f"owner/repo{number}",
                "path": f"{row}.py",
                "copies": "1",
                "content": f"value_{number} = {row}\n" * 5,
            }
            for row in range(40)
        )
        with gzip.open(folder / f"file-{number}.json.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setitem(documents.HUB_DATASETS, "codeparrot", str(folder))
    return folder


def test_codeparrot(tmp_path, small, hub):
    assert run(*small, "--dataset", "codeparrot") == 0
    rows = [json.loads(line) for line in (tmp_path / "data/corpus.jsonl").open()]
    assert len(rows) == 120
    assert rows[41] == {"path": "owner/repo1/1.py", "content": "value_1 = 1\n" * 5}


def test_a_broken_stream_goes_on_where_it_broke(tmp_path, small, hub, capsys):
    small += ["--dataset", "codeparrot"]
    assert run(*small, "--output-dir", tmp_path / "whole") == 0
    whole = (hub / "file-2.json.gz").read_bytes()
    (hub / "file-2.json.gz").write_bytes(whole[:20])
    assert run(*small) == 1
    assert "--dataset codeparrot: the stream broke" in capsys.readouterr().err
    assert not (tmp_path / "data/corpus.jsonl").exists()
    (hub / "file-2.json.gz").write_bytes(whole)
    assert run(*small) == 0
    assert "going on after 80 documents" in capsys.readouterr().err
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_codeparrot_without_a_network(small, capsys):
    assert run(*small, "--dataset", "codeparrot") == 2
    message = capsys.readouterr().err
    assert "--dataset codeparrot: codeparrot/codeparrot-clean-train cannot be read" in message
    assert "--dataset stdlib" in message


@pytest.mark.parametrize(
    "flag,value,part",
    [
        ("--vocab-size", 256, "at least 257"),
        ("--size-mb", 0, "above 0"),
        ("--size-mb", "nan", "above 0"),
        ("--workers", 0, "above 0"),
        ("--output-dir", __file__, "cannot be written to"),
    ],
)
def test_settings_that_cannot_work(small, capsys, flag, value, part):
    assert run(*small, flag, value) == 2
    message = capsys.readouterr().err
    assert f"{flag} {value}" in message
    assert part in message


def test_python_without_its_source(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert run(*small) == 2
    assert "--dataset stdlib: no source files" in capsys.readouterr().err


def test_a_vocabulary_larger_than_the_corpus_fills(tmp_path, small, hub, capsys):
    assert run(*small, "--dataset", "codeparrot", "--vocab-size", 5000) == 0
    assert "all that a corpus of this size holds" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "data/tokenizer/vocab.json").read_text())) < 5000


def test_an_interrupted_run_leaves_nothing_half_made(tmp_path):
    out = tmp_path / "data"
    process = subprocess.Popen(
        [sys.executable, TOOLS / "make_corpus.py", "--output-dir", out],
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not (out / "corpus.jsonl.part").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: ended" in message
    assert "Traceback" not in message
    assert list(out.iterdir()) == []
