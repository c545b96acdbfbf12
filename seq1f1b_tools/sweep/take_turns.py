"""``take_turns.py SCRIPT ARGS...``: train with SCRIPT, waiting for a turn before every step.

The sweep puts this between torchrun and the training script of runs that are compared.
"""

import functools
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

SOCKET_VARIABLE = "SEQ1F1B_SWEEP_TURNS"
PLACE_VARIABLE = "SEQ1F1B_SWEEP_PLACE"


class Turn:
    """This run's turn, which the sweep grants."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._place = environ[PLACE_VARIABLE].encode()
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._end.connect(environ[SOCKET_VARIABLE])

    def wait(self) -> None:
        """Give the turn back, if this run has it, and wait for the next."""
        self._end.sendall(self._place)
        self._end.recv(1)

    def finish(self) -> None:
        """Give the turn back for good, and wait until the others have too.

        The end of a process takes seconds of work, which would fall into the steps of the others.
        """
        self._end.shutdown(socket.SHUT_WR)
        self._end.recv(1)


def take_turns(training: Any) -> None:
    """Let all ranks start each step of Megatron's module ``training`` when it is their turn."""
    import torch

    turn = Turn(os.environ) if os.environ["RANK"] == "0" else None
    train, train_step = training.train, training.train_step

    def on_all_ranks(wait: Callable[[Turn], None]) -> None:
        torch.distributed.barrier()  # all have ended the step before
        if turn is not None:
            wait(turn)
        torch.distributed.barrier()

    @functools.wraps(train_step)
    def step_in_turn(*args: Any, **kwargs: Any) -> Any:
        on_all_ranks(Turn.wait)
        return train_step(*args, **kwargs)

    @functools.wraps(train)
    def train_to_the_end(*args: Any, **kwargs: Any) -> Any:
        result = train(*args, **kwargs)
        on_all_ranks(Turn.finish)
        return result

    training.train, training.train_step = train_to_the_end, step_in_turn


def main() -> None:
    """Put the turns around Megatron's step, then become the script."""
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))

    import megatron.adaptor

    megatron.adaptor.install()
    from megatron.training import training

    take_turns(training)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
