"""``rank.py SCRIPT ARGS...``: train with SCRIPT, waiting for a turn before every step.

The sweep puts this between torchrun and the training script of runs that are compared.
"""

import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.adaptor.patches import Patch

SOCKET_VARIABLE = "SEQ1F1B_SWEEP_TURNS"
PLACE_VARIABLE = "SEQ1F1B_SWEEP_PLACE"


class Turn:
    """This run's turn, which the sweep grants."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._place = environ[PLACE_VARIABLE].encode()
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._end.connect(environ[SOCKET_VARIABLE])

    def wait(self) -> None:
        """Return the turn, if this run has it, and wait for the next."""
        self._end.sendall(self._place)
        self._end.recv(1)

    def finish(self) -> None:
        """Return the turn for good, and wait until the other runs have too.

        The end of a process takes seconds of work, which would fall into the steps of the others.
        """
        self._end.shutdown(socket.SHUT_WR)
        self._end.recv(1)


def patches(turn: Turn | None) -> Sequence["Patch"]:
    """Return what makes all ranks of a run wait together; ``turn`` is None but on rank 0."""
    import torch

    from megatron.adaptor.patches import Patch

    def on_all_ranks(wait: Callable[[Turn], None]) -> None:
        torch.distributed.barrier()  # every rank has ended the step before
        if turn is not None:
            wait(turn)
        torch.distributed.barrier()

    def step_in_turn(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs that are compared wait for their turn before each step."""
        on_all_ranks(Turn.wait)
        return train_step(*args, **kwargs)

    def end_together(train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs that are compared end together, as the end of a process is work too."""
        result = train(*args, **kwargs)
        on_all_ranks(Turn.finish)
        return result

    return (
        Patch("megatron.training.training:train_step", step_in_turn),
        Patch("megatron.training.training:train", end_together),
    )


def main() -> None:
    """Put the turns around Megatron's step, then become the script."""
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))

    import megatron.adaptor

    megatron.adaptor.install()
    from megatron.adaptor.patches import apply_all

    apply_all(patches(Turn(os.environ) if os.environ["RANK"] == "0" else None))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
