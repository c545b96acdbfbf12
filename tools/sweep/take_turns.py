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


def in_turn(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return Megatron's ``train_step``, which starts on all ranks when it is this run's turn."""
    import torch

    turn = Turn(os.environ) if os.environ["RANK"] == "0" else None

    @functools.wraps(train_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        torch.distributed.barrier()  # all have ended the step before
        if turn is not None:
            turn.wait()
        torch.distributed.barrier()
        return train_step(*args, **kwargs)

    return step


def main() -> None:
    """Put the turns around Megatron's step, then become the script."""
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))

    import megatron.adaptor

    megatron.adaptor.install()
    from megatron.training import training

    training.train_step = in_turn(training.train_step)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
