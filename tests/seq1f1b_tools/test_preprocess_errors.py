"""What tools/preprocess_data.py says to bad lines and to settings that cannot work."""

import gzip
import json

import pytest

from tests.seq1f1b_tools.preprocess_runs import ROWS, pair, reference, run, write_jsonl

pytestmark = pytest.mark.usefixtures("thread_settings")

BAD_LINES = {
    b'{"content": "unfinished': "not JSON",
    b'{"content": "\xff"}': "not UTF-8",
    b'["content"]': "holds a JSON list, not an object",
    b'{"text": "x"}': "has no key 'content' (--json-keys); its keys are text",
    b'{"content": 3}': "key 'content' holds int, not text",
    b'{"content": "\\ud800"}': "half a surrogate pair",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_stops_or_is_skipped(tmp_path, gpt2_flags, megatron_tokenizer, capsys, line):
    good = json.dumps(ROWS[0]).encode()
    (tmp_path / "in.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    flags = ["--input", tmp_path / "in.jsonl", "--json-keys", "content", *gpt2_flags]
    assert run(*flags, "--output-prefix", tmp_path / "out/x") == 1
    message = capsys.readouterr().err
    assert f"{tmp_path}/in.jsonl:2: " in message
    assert BAD_LINES[line] in message
    assert "--on-error skip" in message
    assert list((tmp_path / "out").iterdir()) == []

    assert run(*flags, "--output-prefix", tmp_path / "out/x", "--on-error", "skip") == 0
    assert "1 lines skipped" in capsys.readouterr().err
    expected = reference(tmp_path / "ref", [ROWS[0]] * 2, "content", megatron_tokenizer)
    assert pair(tmp_path / "out/x_content_document") == expected


def test_damaged_gz(tmp_path, gpt2_flags, capsys):
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS * 50))
    (tmp_path / "in.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    flags = ["--input", tmp_path / "in.jsonl.gz", "--json-keys", "content", *gpt2_flags]
    assert run(*flags, "--output-prefix", tmp_path / "out/x") == 1
    assert "in.jsonl.gz: cannot be read after line" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_settings_that_cannot_work(tmp_path, gpt2_flags, tokenizer_folder, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("no data here")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "wrong.txt").write_text("#version: 0.2\nzz qq\n")
    vocab, merges = gpt2_flags[2:4], gpt2_flags[4:6]
    gpt2 = ["--tokenizer-type", "GPT2BPETokenizer"]
    hugging_face = ["--tokenizer-type", "HuggingFaceTokenizer"]
    common = ["--json-keys", "content", "--output-prefix", tmp_path / "out/x"]
    given = ["--input", source, *common]
    cases = [
        (["--input", tmp_path / "no*.jsonl", *common, *gpt2_flags], ["--input", "no*.jsonl"]),
        (["--input", tmp_path / "bare", *common, *gpt2_flags], ["--input", "directory"]),
        ([*given, *gpt2, *merges], ["GPT2BPETokenizer needs --vocab-file"]),
        ([*given, *gpt2, *vocab], ["GPT2BPETokenizer needs --merge-file"]),
        ([*given, *gpt2, *merges, "--vocab-file", "nowhere"], ["--vocab-file nowhere: no such"]),
        ([*given, *gpt2, *vocab, "--merge-file", "nowhere"], ["--merge-file nowhere: no such"]),
        ([*given, *gpt2, *merges, "--vocab-file", source], ["--vocab-file", "not a JSON"]),
        ([*given, *gpt2, *merges, "--vocab", tmp_path / "empty.json"], ["<|endoftext|>"]),
        ([*given, *gpt2, *vocab, "--merge-file", tmp_path / "wrong.txt"], ["--merge-file"]),
        ([*given, *hugging_face, "--trust-remote-code"], ["--trust-remote-code", "is not run"]),
        ([*given, *gpt2_flags, "--bogus", "3"], ["--bogus 3", "GPT2BPETokenizer"]),
        ([*given, *hugging_face], ["HuggingFaceTokenizer needs --tokenizer-model"]),
        ([*given, *hugging_face, "--tokenizer-model", "./nowhere"], ["./nowhere: no such folder"]),
        ([*given, *hugging_face, "--tokenizer-model", tmp_path], ["--tokenizer-model", "loaded"]),
        ([*given, "--tokenizer-type", "Unheard"], ["--tokenizer-type Unheard", "NullTokenizer"]),
        ([*given, *gpt2_flags, "--json-keys", "content", "content"], ["--json-keys", "twice"]),
        ([*given, *gpt2_flags, "--json-keys", "../x"], ["--json-keys ../x", "has no /"]),
        ([*given, *gpt2_flags, "--output-prefix", tmp_path / "file/x"], ["--output-prefix"]),
    ]
    for flags, parts in cases:
        assert run(*flags) == 2, flags
        message = capsys.readouterr().err
        assert message.startswith("preprocess_data.py: error: "), message
        assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--workers", "--chunk-size", "--partitions", "--log-interval"])
def test_counts_are_above_zero(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--input", "x", "--output-prefix", "x", "--tokenizer-type", "x", flag, 0)
    assert f"{flag}: '0' is not a whole number above 0" in capsys.readouterr().err


def test_tokenizer_without_eod(tmp_path, tokenizer_folder, capsys):
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    flags += ["--input", source, "--json-keys", "content", "--output-prefix", tmp_path / "out/x"]
    assert run(*flags, "--append-eod") == 2
    assert "--append-eod" in capsys.readouterr().err


def test_no_text_at_all(tmp_path, gpt2_flags, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": ""}])
    assert run("--input", source, "--output-prefix", tmp_path / "out/x", *gpt2_flags) == 1
    assert "no text under the key 'text'" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_lines_in_a_log(tmp_path, gpt2_flags, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--json-keys", "content", "--log-interval", 4, "--chunk-size", 2, *gpt2_flags]
    assert run("--input", source, "--output-prefix", tmp_path / "x", *flags) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "processed" in line]
    assert [line.split()[1] for line in lines] == ["4", "8"]
    assert all("MB/s" in line and "0:00:00 left" in line for line in lines)
