"""A file is replaced whole or not at all."""

import pytest

from seq1f1b.files import replacing


def test_it_is_replaced_at_the_end(tmp_path):
    path = tmp_path / "folder" / "file"
    with replacing(path) as stream:
        stream.write("one")
        assert not path.exists()
    assert path.read_text() == "one"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_after_an_error_it_is_as_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")

    def fail():
        with replacing(path) as stream:
            stream.write("two")
            raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        fail()
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
