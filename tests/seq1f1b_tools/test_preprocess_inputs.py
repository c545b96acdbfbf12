"""What tools/preprocess_data.py takes as --input, and what it says to files that are not whole."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import threading

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from tests.seq1f1b_tools.preprocess_runs import ROWS, command, pair, reference, run, write_jsonl

pytestmark = pytest.mark.usefixtures("thread_settings")

PACKERS = {
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
KEY = ["--json-keys", "content"]


def text_of(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def expected(tmp_path, megatron_tokenizer):
    """Return the pair that some rows make."""
    counter = iter(range(100))
    return lambda rows: reference(
        tmp_path / f"reference{next(counter)}", rows, "content", megatron_tokenizer
    )


@pytest.fixture
def made(tmp_path, gpt2_flags):
    """Return the pair that an input makes."""

    def make(*inputs, flags=()):
        prefix = tmp_path / "out" / "x"
        assert run("--input", *inputs, "--output-prefix", prefix, *KEY, *gpt2_flags, *flags) == 0
        return pair(f"{prefix}_content_document")

    return make


@pytest.fixture
def refused(tmp_path, gpt2_flags, capsys):
    """Return the message about an input that cannot be used."""

    def refuse(*inputs, flags=()):
        prefix = tmp_path / "out" / "x"
        code = run("--input", *inputs, "--output-prefix", prefix, *KEY, *gpt2_flags, *flags)
        assert code in (1, 2)
        assert not list(tmp_path.glob("out/*"))
        return capsys.readouterr().err

    return refuse


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("num_streams", [1, 3])
def test_compressed_files(tmp_path, made, expected, suffix, num_streams):
    """Several streams in a file follow one another, as `cat a.zst b.zst` leaves them."""
    packed = b"".join(PACKERS[suffix](text_of(ROWS)) for _ in range(num_streams))
    (tmp_path / f"in.jsonl{suffix}").write_bytes(packed)
    assert made(tmp_path / f"in.jsonl{suffix}") == expected(ROWS * num_streams)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_is_known_by_what_is_in_it(tmp_path, made, expected, suffix):
    (tmp_path / "in.jsonl").write_bytes(PACKERS[suffix](text_of(ROWS)))
    assert made(tmp_path / "in.jsonl") == expected(ROWS)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize("damage", ["cut off", "flipped", "second stream", "plain text"])
def test_a_damaged_file_is_named_whatever_is_to_be_done_with_bad_lines(
    tmp_path, refused, suffix, on_error, damage
):
    packed = PACKERS[suffix](text_of(ROWS * 50))
    if damage == "cut off":
        packed = packed[:-9]
    elif damage == "flipped":
        middle = len(packed) // 2
        packed = (
            packed[:middle]
            + bytes(b ^ 0xFF for b in packed[middle : middle + 8])
            + packed[middle + 8 :]
        )
    elif damage == "second stream":
        packed += b"not a stream at all"
    else:
        packed = text_of(ROWS)
    file = tmp_path / f"in.jsonl{suffix}"
    if suffix == ".zst" and damage == "flipped":
        packed = packed[:40]  # without a check sum a flipped byte may be another text
    file.write_bytes(packed)
    message = refused(file, flags=["--on-error", on_error])
    assert f"{file}: " in message
    assert "--on-error" not in message


def test_patterns_go_into_folders(tmp_path, made, expected):
    (tmp_path / "deep/er/est").mkdir(parents=True)
    write_jsonl(tmp_path / "deep/a.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "deep/er/b.jsonl", ROWS[2:4])
    write_jsonl(tmp_path / "deep/er/est/c.jsonl", ROWS[4:6])
    assert made(tmp_path / "deep/**/*.jsonl") == expected(ROWS[:6])
    assert made(tmp_path / "deep/*/*.jsonl") == expected(ROWS[2:4])


def test_a_folder_gives_all_that_holds_documents(tmp_path, made, expected, capsys):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_jsonl(folder / "a.jsonl", ROWS[:2])
    (folder / "b" / "x.JSONL.GZ").write_bytes(gzip.compress(text_of(ROWS[2:4])))
    table = pyarrow.table({"content": [ROWS[5]["content"]], "other": [1]})
    parquet.write_table(table, folder / "c.parquet")
    write_jsonl(folder / ".hidden" / "d.jsonl", ROWS)
    (folder / "README.md").write_text("x")
    (folder / "again").symlink_to(folder)
    assert made(folder) == expected(ROWS[:4] + ROWS[5:6])
    assert f"{folder}: 3 files taken, 1 left out ({folder}/README.md)" in capsys.readouterr().err


def test_parquet(tmp_path, made, expected):
    contents = [row["content"] for row in ROWS if isinstance(row["content"], str)]
    table = pyarrow.table({"content": contents, "id": range(len(contents))})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    assert made(tmp_path / "in.parquet") == expected([{"content": text} for text in contents])
    lists = pyarrow.table({"content": [["a ", "b"], [], ["c"]]})
    parquet.write_table(lists, tmp_path / "in.parquet")
    rows = [{"content": value} for value in (["a ", "b"], [], ["c"])]
    assert made(tmp_path / "in.parquet") == expected(rows)


def test_parquet_that_cannot_be_used(tmp_path, refused, made, expected):
    file = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "id": [3]}), file)
    assert "has no column 'content' (--json-keys); its columns are text, id" in refused(file)
    parquet.write_table(pyarrow.table({"content": [1, 2]}), file)
    assert f"{file}:1: key 'content' holds int, not text" in refused(file)
    parquet.write_table(pyarrow.table({"content": ["a", None, "b"]}), file)
    assert f"{file}:2: key 'content' holds NoneType" in refused(file)
    assert made(file, flags=["--on-error", "skip"]) == expected(
        [{"content": "a"}, {"content": "b"}]
    )
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    file.write_bytes(file.read_bytes()[:-5])
    assert f"{file}: cannot be read" in refused(file, flags=["--on-error", "skip"])


@pytest.mark.parametrize("packed", [False, True])
def test_pipes(tmp_path, gpt2_flags, expected, packed):
    content = text_of(ROWS)
    content = zstandard.compress(content) if packed else content
    done = subprocess.run(
        command("--input", "/dev/stdin", "--output-prefix", tmp_path / "x", *KEY, *gpt2_flags),
        input=content,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert pair(tmp_path / "x_content_document") == expected(ROWS)


def test_a_named_pipe_and_a_file(tmp_path, made, expected):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    source = write_jsonl(tmp_path / "in.jsonl", ROWS[4:])

    def feed():
        with open(pipe, "wb", buffering=0) as stream:
            for start in range(0, 40, 1):  # byte by byte, the sign of a compression too
                stream.write(content[start : start + 1])
            stream.write(content[40:])

    content = gzip.compress(text_of(ROWS[:4]))
    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    assert made(pipe, source, flags=["--log-interval", 1]) == expected(ROWS)
    thread.join(10)
    assert not thread.is_alive()


def test_a_pipe_is_read_once(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe can be read only once" in refused(tmp_path / "pipe", tmp_path / "pipe")


def test_a_byte_order_mark_and_blank_lines_are_skipped(tmp_path, made, expected):
    lines = b"\n  \t\r\n".join(text_of(ROWS[:3]).splitlines(keepends=True))
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + lines + b"\n\n")
    assert made(tmp_path / "in.jsonl") == expected(ROWS[:3])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_other_encodings_are_named(tmp_path, refused, encoding, on_error):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "in.jsonl").write_bytes((mark + text_of(ROWS).decode()).encode(encoding))
    message = refused(tmp_path / "in.jsonl", flags=["--on-error", on_error])
    assert f"{tmp_path}/in.jsonl: is UTF-16: convert it" in message


def test_a_file_of_bad_lines_only_is_not_skipped(tmp_path, refused):
    good = write_jsonl(tmp_path / "a.jsonl", ROWS)
    bad = tmp_path / "b.jsonl"
    bad.write_bytes(random.Random(3).randbytes(4000))
    message = refused(good, bad, flags=["--on-error", "skip"])
    assert f"{bad}: no line of it holds a document: leave the file out" in message


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_asked(tmp_path, tokenizer_folder):
    folder, mark = tmp_path / "own", tmp_path / "mark"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--input", source, *KEY, "--output-prefix", tmp_path / "x"]
    flags += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    done = subprocess.run(
        command(*flags), input="y\n" * 9, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "--tokenizer-model" in done.stderr
    assert "[y/N]" not in done.stderr + done.stdout
    assert not mark.exists()
