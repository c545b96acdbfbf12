"""Run a function on several ranks of this machine, joined over gloo."""

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seq1f1b.errors import Seq1F1BError
from seq1f1b.processes import end_now, end_with_starter, ending

_PATIENCE = timedelta(minutes=10)
_CONTEXT = mp.get_context("forkserver")


class RanksError(Seq1F1BError, RuntimeError):
    """A rank ended without an answer; what it raised comes as it is."""


class _Answer(NamedTuple):
    """What each rank sends once. when: seconds of the machine's clock, the same for all ranks."""

    when: float
    error: Exception | None
    trace: str
    result: Any


class _Rank(NamedTuple):
    process: Any
    answers: Connection


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> Any:
    """Return what ``function(*args)`` returns on rank 0 of ``size`` new processes on the CPU.

    The function must be importable. Its module is imported once, and the ranks are forks of that
    process. What a rank raises is raised here; the other ranks are ended.

    Raises RanksError when a rank ends without an answer, by a signal or by leaving Python.
    """
    _CONTEXT.set_forkserver_preload([__name__, "transformers.modeling_utils", function.__module__])
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        try:
            for rank in range(size):
                ranks.append(_start(rank, size, store, function, args))
            return _collect(ranks)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _start(
    rank: int, size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> _Rank:
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(
        target=_serve,
        args=(rank, size, store, dict(os.environ), theirs, function, args),
        daemon=True,
    )
    process.start()
    # The rank alone holds this end from now on, so that its death ends the pipe, in the middle of
    # an answer too.
    theirs.close()
    return _Rank(process, ours)


def _collect(ranks: list[_Rank]) -> Any:
    """Return rank 0's result once all ranks have answered; raise the first error of any."""
    missing = {rank.answers: number for number, rank in enumerate(ranks)}
    result = None
    while missing:
        ready = wait(list(missing))
        answers = {
            number: _receive(number, ranks[number])
            for pipe, number in missing.items()
            if pipe in ready
        }
        missing = {pipe: number for pipe, number in missing.items() if number not in answers}
        for answer in sorted(answers.values(), key=lambda answer: answer.when):
            if answer.error is not None:
                answer.error.add_note(answer.trace)
                raise answer.error
        result = answers[0].result if 0 in answers else result
    return result


def _receive(number: int, rank: _Rank) -> _Answer:
    try:
        return rank.answers.recv()
    except EOFError:
        rank.process.join()
        raise RanksError(
            f"rank {number} ended {ending(rank.process.exitcode)} and without an answer. "
            "Out of memory? Then use fewer ranks or a smaller model"
        ) from None


def _serve(
    rank: int,
    size: int,
    store: str,
    environ: dict[str, str],
    answers: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    end_with_starter()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter gets it too, and ends its ranks
    torch.set_num_threads(1)
    os.environ.clear()  # the fork server's, which is that of the first call
    os.environ.update(environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=_PATIENCE
    )
    try:
        result = function(*args)
        dist.barrier()
        answer = _Answer(time.monotonic(), None, "", result if rank == 0 else None)
    except Exception as error:
        answer = _Answer(time.monotonic(), _portable(error), traceback.format_exc(), None)
    answers.send(answer)
    end_now(0)


def _portable(error: Exception) -> Exception:
    """Return the error, or its text where the error itself cannot be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
