"""What a sweep reads from files: logs of failures, figures, and the data that is there."""

import os
import time
from pathlib import Path

import pytest

from seq1f1b_tools.sweep.corpus import CorpusError, prepare
from seq1f1b_tools.sweep.launch import explain
from seq1f1b_tools.sweep.records import (
    largest_loss_difference,
    read_metrics,
    summarize,
)
from seq1f1b_tools.sweep.tied import own_cores
from tests.seq1f1b_tools.sweep.bench import make_no_data


def test_reasons_of_failures_are_found_in_logs(tmp_path):
    def of(text: str, status: int = 1) -> tuple[str, str]:
        log = tmp_path / "log"
        log.write_text(text)
        return explain(log, status)

    cuda = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert of(f"...\n[rank3]: {cuda}\nChildFailedError: x\n") == ("oom", cuda)
    assert of("[rank1]: ValueError: bad\n[rank0]: RuntimeError: Connection closed by peer\n") == (
        "failed",
        "ValueError: bad",
    )
    listed = (
        "megatron.adaptor.settings.SettingsError: cannot run:\n  - --a is bad\n  - --b is bad\n"
    )
    assert of(listed)[1].endswith("cannot run: - --a is bad - --b is bad")
    assert of("pretrain_gpt.py: error: unrecognized arguments: --x\nusage\n")[1] == (
        "pretrain_gpt.py: error: unrecognized arguments: --x"
    )
    assert of("  exitcode  : -9 (pid: 12)\n")[0] == "oom"
    assert of("starting\n", -9)[0] == "oom"
    assert of("starting\n\n", 3) == ("failed", "starting")
    assert of("", 3) == ("failed", "ended with status 3 and no message")


def test_line_that_is_being_written_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"iteration": 1}\n{"itera')
    assert read_metrics(file) == [{"iteration": 1}]


def test_summary_of_nothing_but_warm_up_is_none():
    assert summarize([{"iteration": 1}], 1) is None


def test_loss_differences():
    assert largest_loss_difference([2.0, 1.0], [2.0, 1.1]) == pytest.approx(0.1 / 1.1)
    assert largest_loss_difference([float("nan")], [2.0]) == float("inf")
    assert largest_loss_difference([None], [2.0]) is None


def test_cores_are_dealt_to_ranks():
    assert [own_cores([2, 3, 6, 7], rank, 2) for rank in (0, 1)] == [[2, 3], [6, 7]]
    assert [own_cores([0, 1, 2], rank, 2) for rank in (0, 1)] == [[0], [1, 2]]
    assert own_cores([0, 1], 2, 4) == [0, 1]


def test_data_is_made_by_the_tools_and_not_made_twice(bench):
    settings = bench.settings()
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        if "preprocess_data.py" in command[1]:
            make_no_data(settings)
        return 0

    corpus = prepare(settings, run)
    assert [Path(command[1]).name for command in commands] == [
        "make_corpus.py",
        "preprocess_data.py",
    ]
    assert str(corpus.documents) in commands[1]
    prepare(settings, run)
    assert len(commands) == 3
    os.utime(corpus.documents, (time.time() + 9, time.time() + 9))
    prepare(settings, run)
    assert Path(commands[-1][1]).name == "preprocess_data.py"


def test_tool_that_fails_ends_the_sweep(bench):
    with pytest.raises(CorpusError, match=r"tools/make_corpus.py ended with status 2"):
        prepare(bench.settings(), lambda command: 2)
