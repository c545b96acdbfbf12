"""Data of a run: formats, what is learned, packing, and an order that no rank changes."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seq1f1b.ulysses.training.data import DataError, Order, PackedRows, make_rows, prepare_rows
from seq1f1b.ulysses.training.data.encode import Encoder
from seq1f1b.ulysses.training.data.records import Record, read_records
from seq1f1b.ulysses.training.recipe import DataSettings
from seq1f1b.ulysses.training.tokenizer import byte_tokenizer
from tests.ulysses.training.recipes import write_texts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def learned_text(tokenizer: Any, content: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """Return the whole text of a record, and what of it is learned."""
    options = DataSettings(source="x", max_length=8, **settings)
    document = Encoder(options, tokenizer).encode(Record("x:1", content))
    learned = [
        t for t, is_learned in zip(document.tokens, document.learned, strict=True) if is_learned
    ]
    return tokenizer.decode(document.tokens), tokenizer.decode(learned)


def test_bytes_come_back_as_they_went_in(tokenizer):
    text = "def f(x):\n\treturn 'é' + x  # 3\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_of_a_text_everything_is_learned(tokenizer):
    assert learned_text(tokenizer, {"text": "abc"}) == ("abc<|end|>", "abc<|end|>")


def test_of_a_prompt_the_answer_is_learned(tokenizer):
    content = {"question": "1+1?", "reply": "2"}
    keys = {"prompt_key": "question", "answer_key": "reply"}
    assert learned_text(tokenizer, content, **keys) == ("1+1?2<|end|>", "2<|end|>")


def test_of_a_conversation_the_assistants_turns_are_learned(tokenizer):
    turns = [
        ("system", "S"),
        ("user", "U"),
        ("assistant", "A1"),
        ("user", "V"),
        ("assistant", "A2"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    whole, learned = learned_text(
        tokenizer, {"messages": [*messages, {"role": "user", "content": "W"}]}
    )
    assert learned == "A1<|end|>A2<|end|>"
    assert whole.endswith("<|start|>assistant\nA2<|end|>")


ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    "content, settings, message",
    [
        ({"body": "x"}, {}, "x:1: has body, and neither text nor messages nor prompt and answer"),
        ({"text": 3}, {}, "x:1: text must be text, not int"),
        ({"messages": "hello"}, {}, "x:1: messages must be a list of turns"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "the assistant says nothing"),
        ({"prompt": "x"}, {"format": "prompt"}, "x:1: answer must be text, not NoneType"),
        ({"text": "ab\ud800"}, {}, "x:1: text holds half a surrogate pair at character 2"),
        ({"messages": [ASKED, {"role": "assistant"}]}, {}, "turn 2 of messages must have text as"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, {}, "turn 1 .* content, not list"),
        (
            {"messages": [{"role": "user", "content": "\udfff"}]},
            {},
            "turn 1 of messages holds half",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, {}, "begins with the assistant"),
    ],
)
def test_a_bad_record_is_named(tokenizer, content, settings, message):
    with pytest.raises(DataError, match=message):
        learned_text(tokenizer, content, **settings)


@pytest.mark.parametrize("source, package", [("a.parquet", "pyarrow"), ("a/b", "datasets")])
def test_packages_of_the_extra_are_named(tmp_path, monkeypatch, source, package):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=f"needs the package {package}: pip install .seq1f1b.data."):
        next(read_records(source, "train"))


def test_files_of_every_kind_are_read(tmp_path):
    from pyarrow import Table, parquet

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    parquet.write_table(Table.from_pylist([{"text": "three"}]), tmp_path / "b.parquet")
    texts = [record.content["text"] for record in read_records(str(tmp_path), "train")]
    assert texts == ["one", "two", "three"]
    by_pattern = [r.place for r in read_records(str(tmp_path / "*.parquet"), "train")]
    assert by_pattern == [f"{tmp_path / 'b.parquet'}, record 1"]
    assert next(read_records("python-library", "train")).place.endswith(".py")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"text": 1}\n{', "a.jsonl:2: no JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: a record is an object, not list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: not UTF-8 at byte 10 of the"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: no JSON"),
        ("a.jsonl", "1" * 10_000, "a.jsonl:1: no JSON"),
        ("a.parquet", "nothing", "a.parquet: no Parquet"),
        ("a.txt", "nothing", "must end in .jsonl or .json or .parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        list(read_records(str(tmp_path / name), "train"))


def test_parquet_that_is_damaged_in_its_midst_is_named(tmp_path):
    from pyarrow import Table, parquet

    file = tmp_path / "a.parquet"
    table = Table.from_pylist([{"text": f"text {number}"} for number in range(600)])
    parquet.write_table(table, file, row_group_size=300, compression="gzip")
    content = bytearray(file.read_bytes())
    half = len(content) // 3
    content[half : half + 200] = bytes(200)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet, behind record \d+: "):
        list(read_records(str(file), "train"))


def test_a_mark_of_byte_order_is_no_part_of_a_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8-sig")
    (record,) = read_records(str(tmp_path / "a.jsonl"), "train")
    assert record.content == {"text": "one"}


def test_a_missing_file_is_named(tmp_path):
    for name in (str(tmp_path / "x.jsonl"), "./y.parquet"):
        with pytest.raises(DataError, match="no file"):
            list(read_records(name, "train"))


LENGTHS = np.array([5, 30, 12, 1, 8, 64, 3, 20, 31, 9], dtype=np.int64)


@pytest.mark.parametrize("packing", ["whole", "cut", "none"])
@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_rows_hold_every_token_once(packing, too_long):
    rows = make_rows(LENGTHS, 32, packing, too_long)
    seen = [np.zeros(n, dtype=int) for n in LENGTHS]
    for row in rows:
        assert sum(piece.length for piece in row) <= 32
        for piece in row:
            seen[piece.document][piece.start : piece.stop] += 1
    for number, counts in enumerate(seen):
        dropped = LENGTHS[number] == 1 or (LENGTHS[number] > 32 and too_long == "drop")
        assert (counts == (0 if dropped else 1)).all()
    total = sum(LENGTHS[LENGTHS > 1]) - (64 if too_long == "drop" else 0)
    if packing == "cut":
        assert len(rows) == math.ceil(total / 32)
    if packing == "whole":
        whole = [p for row in rows for p in row if LENGTHS[p.document] <= 32]
        assert all(p.length == LENGTHS[p.document] for p in whole)
        assert len(rows) == math.ceil(total / 32)
    if packing == "none":
        assert all(len(row) == 1 for row in rows)


def test_no_document_left_is_an_error():
    with pytest.raises(DataError, match="no document is left of 1"):
        make_rows(np.array([64], dtype=np.int64), 32, "whole", "drop")


def packed(tmp_path: Path, tokenizer: Any, **settings: Any) -> PackedRows:
    options = DataSettings(source=str(write_texts(tmp_path)), max_length=96, **settings)
    return prepare_rows(options, tokenizer, "bytes", tmp_path / "cache")


def test_a_batch_has_positions_labels_and_a_mask(tmp_path, tokenizer):
    rows = packed(tmp_path, tokenizer)
    batch = rows.batch([0, len(rows.rows) - 1])
    for index, row in enumerate((rows.rows[0], rows.rows[-1])):
        begin = 0
        for piece in row:
            place = slice(begin, begin + piece.length)
            assert batch.position_ids[index, place].tolist() == list(range(piece.length))
            assert batch.labels[index, begin] == -100
            assert torch.equal(
                batch.labels[index, begin + 1 : place.stop],
                batch.input_ids[index, begin + 1 : place.stop],
            )
            begin = place.stop
        assert (batch.labels[index, begin:] == -100).all()
        if batch.attention_mask is not None:
            assert batch.attention_mask[index].sum() == begin
    assert batch.num_targets == int((batch.labels != -100).sum())


def test_encoded_data_is_found_again_until_a_file_changes(tmp_path, tokenizer):
    first = packed(tmp_path, tokenizer)
    folders = set((tmp_path / "cache").iterdir())
    again = DataSettings(source=str(tmp_path / "texts.jsonl"), max_length=64, packing="none")
    prepare_rows(again, tokenizer, "bytes", tmp_path / "cache")
    assert set((tmp_path / "cache").iterdir()) == folders
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "another"}) + "\n")
    options = DataSettings(source=str(tmp_path / "texts.jsonl"), max_length=96)
    second = prepare_rows(options, tokenizer, "bytes", tmp_path / "cache")
    assert len(second.rows) == 1 < len(first.rows)


def test_the_order_is_a_new_shuffle_of_all_rows_in_every_epoch():
    order = Order(10, 4, seed=3)
    drawn = [row for step in range(5) for row in order.step(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert order.step(7) == Order(10, 4, seed=3).step(7)
