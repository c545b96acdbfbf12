"""Room on the disk: looked at before training, and named when a save fails for want of it.

What torch and Megatron say then is ``unexpected pos 704 vs 598``, or nothing but a type's name.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron.adaptor.checkpoints.loading import CheckpointError
from megatron.adaptor.command_line.refusals import refuse
from megatron.adaptor.patches import Patch
from seq1f1b.files import existing_folder, why_full

_TRAINING = "megatron.training.training"
_GIB = 1 << 30


class Room:
    """Watches the folder of ``--save``, for the job whose arguments ``arguments`` returns."""

    def __init__(self, arguments: Callable[[], argparse.Namespace | None]) -> None:
        self._arguments = arguments

    def patches(self) -> list[Patch]:
        """Return what is replaced around saving."""
        return [
            Patch(f"{_TRAINING}:setup_model_and_optimizer", self.setup_model_and_optimizer),
            Patch("megatron.training.checkpointing:save_checkpoint", self.save),
            Patch("megatron.training.async_utils:maybe_finalize_async_save", self.save),
        ]

    def setup_model_and_optimizer(
        self, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Refuse to train towards a checkpoint that the disk has no room for."""
        result = original(*args, **kwargs)
        found = self._arguments()
        if found is not None and found.save is not None and not found.skip_train:
            needed = checkpoint_bytes(found, result[0])
            free = torch.tensor([_free(Path(found.save))], dtype=torch.float64, device="cuda")
            torch.distributed.all_reduce(free, op=torch.distributed.ReduceOp.MAX)
            if needed > float(free):
                fault = (
                    f"--save {found.save}: a checkpoint takes about {needed / _GIB:.3g} GiB and "
                    f"{float(free) / _GIB:.3g} GiB are left: make room, or name another folder"
                )
                refuse([fault], torch.distributed.get_rank())
        return result

    def save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Report a full disk where that is why a checkpoint was not saved."""
        try:
            return original(*args, **kwargs)
        except (Exception, CheckpointException) as error:
            found = self._arguments()
            if found is None or found.save is None:
                raise
            folder = Path(found.save)
            why = why_full(folder, error)
            if why is None:
                raise
            raise CheckpointError(
                f"--save {folder}: a checkpoint was not saved, because {why}; {_kept(folder)}"
            ) from error


def checkpoint_bytes(args: argparse.Namespace, model: list[torch.nn.Module]) -> float:
    """Estimate the bytes of one checkpoint of the whole job; every rank must call.

    Weights, and for each of them what Adam keeps (two float32 numbers, and a third where the
    weights are shorter), unless ``--no-save-optim``. Parameters count once over their replicas.
    """
    from megatron.core import parallel_state

    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    of_experts = parallel_state.get_expert_data_parallel_world_size()
    total = 0.0
    for chunk in model:
        for parameter in chunk.parameters():
            size = parameter.element_size()
            state = 0 if args.no_save_optim else 8 + 4 * (size < 4)
            shared = replicas if getattr(parameter, "allreduce", True) else of_experts
            total += parameter.numel() * (size + state * parameter.requires_grad) / shared
    sums = torch.tensor([total], dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(sums)
    return float(sums)


def _kept(folder: Path) -> str:
    tracker = folder / "latest_checkpointed_iteration.txt"
    try:
        return f"that of iteration {int(tracker.read_text())} is whole"
    except (OSError, ValueError):
        return "there is none yet"


def _free(folder: Path) -> int:
    return shutil.disk_usage(existing_folder(folder)).free
