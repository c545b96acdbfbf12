"""Run a function on several ranks of this machine, joined over gloo."""

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seq1f1b.errors import Seq1F1BError
from seq1f1b.processes import end_now

_PATIENCE = timedelta(minutes=10)


class RanksError(Seq1F1BError, RuntimeError):
    """A rank died without a word; what it raised comes as it is."""


def run_ranks(function: Callable[..., Any], size: int, *args: Any) -> Any:
    """Return what ``function(*args)`` returns on rank 0 of ``size`` new processes on the CPU.

    The function must be importable. What a rank raises is raised here; the other ranks are ended.
    """
    context = mp.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            context.Process(
                target=_serve, args=(rank, size, store, answers, function, args), daemon=True
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            return _wait(processes, answers)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait(processes: list[Any], answers: Any) -> Any:
    while True:
        try:
            error, trace, result = answers.get(timeout=0.2)
        except queue.Empty:
            codes = [process.exitcode for process in processes]
            dead = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            if dead:
                raise RanksError(f"rank {dead[0]} died (exit status {codes[dead[0]]})") from None
            continue
        if error is not None:
            error.add_note(trace)
            raise error
        return result


def _serve(
    rank: int, size: int, store: str, answers: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=_PATIENCE
    )
    try:
        result = function(*args)
        dist.barrier()
        if rank == 0:
            answers.put((None, "", result))
    except Exception as error:
        answers.put((_portable(error), traceback.format_exc(), None))
    # The queue's thread must have sent everything before the process ends.
    answers.close()
    answers.join_thread()
    end_now(0)


def _portable(error: Exception) -> Exception:
    """Return the error, or its text where the error itself does not fit into a queue."""
    import pickle

    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
