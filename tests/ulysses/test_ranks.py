"""Functions on ranks of this machine: results, errors, and ranks that end without either."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from seq1f1b.ulysses.ranks import RanksError, run_ranks
from tests.forks import TorchFork
from tests.processes import is_alive, wait_for

pytestmark = pytest.mark.distributed


def sum_over_ranks(offset: int) -> int:
    total = torch.tensor(offset + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such layer")
    dist.barrier()


def end_rank_1(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(int(how))
    dist.barrier()


def answer_with_code() -> object:
    return lambda: None


def variable() -> str | None:
    return os.environ.get("SEQ1F1B_TEST_VARIABLE")


def note_number(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(100)


def start_two(folder: Path) -> None:
    run_ranks(note_number, 2, folder)


def test_the_result_is_that_of_rank_0() -> None:
    assert run_ranks(sum_over_ranks, 2, 10) == 21


def test_ranks_have_the_environment_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQ1F1B_TEST_VARIABLE", "set")
    assert run_ranks(variable, 1) == "set"
    monkeypatch.delenv("SEQ1F1B_TEST_VARIABLE")
    assert run_ranks(variable, 1) is None


def test_an_error_comes_as_the_rank_raised_it_with_its_traceback() -> None:
    with pytest.raises(ValueError, match="no such layer") as raised:
        run_ranks(fail_on_rank_1, 2)
    assert "in fail_on_rank_1" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    "how, ending", [("signal", "by signal SIGKILL"), ("0", "with exit code 0")]
)
def test_a_rank_that_ends_without_an_answer_is_reported(how: str, ending: str) -> None:
    with pytest.raises(RanksError, match=f"rank 1 ended .*{ending} and without an answer"):
        run_ranks(end_rank_1, 2, how)


def test_a_result_that_cannot_be_sent_is_reported() -> None:
    with pytest.raises(RanksError, match="rank 0 ended with exit code 1"):
        run_ranks(answer_with_code, 2)


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    starter = TorchFork(target=start_two, args=(tmp_path,), daemon=False)
    starter.start()
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    starter.kill()
    starter.join()
    wait_for(lambda: not any(is_alive(int(file.name)) for file in tmp_path.iterdir()))
