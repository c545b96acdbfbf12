"""What updates the weights: FSDP2 with torch's AdamW, or DeepSpeed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from seq1f1b.ulysses.training.recipe import RecipeError, TrainingSettings


class Engine(Protocol):
    """One per rank; every method is called on all ranks together."""

    model: nn.Module

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a micro-batch, the last one of its step or not."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip, update the weights, and return the norm of the gradients before clipping."""
        ...

    def save(self, folder: Path) -> None:
        """Write what ``load`` needs to continue."""
        ...

    def load(self, folder: Path) -> None:
        """Continue where ``save`` left off, on this or another number of ranks."""
        ...

    def whole_weights(self) -> dict[str, Any]:
        """Return all weights on rank 0, on the CPU; nothing elsewhere."""
        ...


class FsdpEngine:
    """A model that ``sharding.shard`` has divided."""

    def __init__(self, model: nn.Module, settings: TrainingSettings) -> None:
        self.model = model
        self._settings = settings
        self._optimizer = torch.optim.AdamW(
            parameter_groups(model.named_parameters(), settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
        )

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See Engine."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """See Engine."""
        limit = self._settings.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), float("inf") if limit is None else limit
        )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def save(self, folder: Path) -> None:
        """See Engine: torch's distributed checkpoint, which any number of ranks can read."""
        state_dict_saver.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """See Engine."""
        if not (folder / ".metadata").is_file():
            raise RecipeError(
                f"--resume: {folder} holds no checkpoint of FSDP2; continue with the --deepspeed "
                f"that wrote it"
            )
        state = self._state()
        state_dict_loader.load(state, checkpoint_id=folder)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self._optimizer, state["optimizer"])

    def whole_weights(self) -> dict[str, Any]:
        """See Engine."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self._optimizer),
        }


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Divide parameters into matrices, which decay, and vectors, which do not."""
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
