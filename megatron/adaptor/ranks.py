"""Ranks that agree before they train, name the cause when one of them fails, and leave together."""

import argparse
import atexit
import importlib.metadata
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.adaptor.checkpoints.loading import FinishedError
from megatron.adaptor.error_file import record
from megatron.adaptor.patches import Patch
from megatron.adaptor.reports.console import print_first
from seq1f1b import agreement
from seq1f1b.agreement import RanksDifferError, digest_of_code
from seq1f1b.errors import Seq1F1BError
from seq1f1b.runtime import LinkError

__all__ = ["PeerLostError", "Ranks", "RanksDifferError", "check_same"]

logger = logging.getLogger(__name__)

# Arguments that may differ between ranks: who a rank is, folders of its machine, ports.
_MAY_DIFFER = frozenset(
    {
        "rank",
        "local_rank",
        "data_cache_path",
        "non_persistent_local_ckpt_dir",
        "result_rejected_tracker_filename",
        "tensorboard_dir",
        "wandb_save_dir",
        "flight_recorder_dump_path",
        "memory_snapshot_path",
        "inference_coordinator_port",
        "straggler_ctrlr_port",
        "object_storage_cache_path",
        "seq1f1b_metrics_file",
        "seq1f1b_trace_file",
    }
)
_LOST_PEER = re.compile(
    r"connection (?:closed|reset)|broken pipe|timed out waiting|socket timeout|"
    r"remote process exited|communicator was aborted",
    re.IGNORECASE,
)


class PeerLostError(Seq1F1BError, RuntimeError):
    """This rank stopped because another rank had stopped before."""


class Ranks:
    """Wraps a training job; ``arguments`` returns this process's, once they are known."""

    def __init__(self, arguments: Callable[[], argparse.Namespace | None]) -> None:
        self._arguments = arguments

    def patches(self) -> list[Patch]:
        """Return what is replaced at the start and the end of Megatron's training."""
        return [
            Patch(
                "megatron.core.parallel_state:initialize_model_parallel",
                self.initialize_model_parallel,
            ),
            Patch("megatron.training.training:pretrain", self.pretrain),
        ]

    def initialize_model_parallel(
        self, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compare arguments and code of all ranks, which differences would leave waiting."""
        arguments = self._arguments()
        if arguments is not None and dist.is_initialized() and dist.get_world_size() > 1:
            check_same(_comparable(arguments))
        return original(*args, **kwargs)

    def pretrain(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Name the rank and the cause of a failure, and let all ranks leave together."""

        @record
        def train() -> Any:
            try:
                result = _unless_finished(original, *args, **kwargs)
                dist.barrier()
            except SystemExit as error:
                if error.code in (None, 0):
                    logger.warning("%s ends the process with exit code 0", self._where())
                raise
            except Exception as error:
                if not _follows_from_another(error):
                    raise
                raise PeerLostError(
                    f"{self._where()} stopped because it lost another rank, which has failed, "
                    "was killed, hangs or has left the job; the cause is in that rank's own "
                    f"output ({_first_line(error)})"
                ) from error
            return result

        result = train()
        # Only now, so that none loses a connection that it still uses.
        atexit.register(_destroy_groups)
        return result

    def _where(self) -> str:
        iteration = getattr(self._arguments(), "curr_iteration", None)
        rank = f"rank {dist.get_rank()}" if dist.is_initialized() else "this rank"
        return rank if iteration is None else f"{rank}, iteration {iteration + 1},"


def _unless_finished(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function``; a job with nothing left to train prints why and succeeds."""
    try:
        return function(*args, **kwargs)
    except FinishedError as finished:
        print_first(str(finished))
        return None


def check_same(own: dict[str, str], group: Any = None) -> None:
    """Raise RanksDifferError, with flags, ranks and values, unless all ranks have the same entries.

    All ranks of ``group`` must call.
    """
    agreement.check_same({_as_flag(name): value for name, value in own.items()}, group)


def _as_flag(name: str) -> str:
    return name if " " in name else f"--{name.replace('_', '-')}"


def _comparable(arguments: argparse.Namespace) -> dict[str, str]:
    """Return arguments and versions as text, without addresses of objects."""
    values = {
        name: re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        for name, value in vars(arguments).items()
        if name not in _MAY_DIFFER and not name.startswith("_")
    }
    return values | {
        "version of torch": torch.__version__,
        "version of megatron-core": importlib.metadata.version("megatron-core"),
        "code of Seq1F1B": _digest_of_code(),
    }


@cache
def _digest_of_code() -> str:
    import seq1f1b

    return digest_of_code(Path(seq1f1b.__file__).parent, Path(__file__).parent)


def _follows_from_another(error: BaseException | None) -> bool:
    """Whether an error only tells that the other end of a connection is gone."""
    while error is not None:
        if isinstance(error, LinkError | dist.DistError):
            return True
        if isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__
    return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _destroy_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
