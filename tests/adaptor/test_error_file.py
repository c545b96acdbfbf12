"""torchrun may read a rank's error at any moment, and shows it."""

import json
import threading

import pytest

from megatron.adaptor.error_file import record


def fail(message):
    raise ValueError(message)


def record_one(message):
    with pytest.raises(ValueError, match="long"):
        record(fail)(message)


def test_the_file_is_whole_at_any_moment(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    message = "long " * 2_000_000
    raising = threading.Thread(target=record_one, args=[message])
    raising.start()
    while raising.is_alive() and not path.exists():
        pass
    text = path.read_text()
    raising.join()
    assert json.loads(text)["message"]["message"] == f"ValueError: {message}"
    assert list(tmp_path.iterdir()) == [path]


def test_without_torchrun_the_error_is_raised(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(ValueError, match="cosmic ray"):
        record(fail)("cosmic ray")
