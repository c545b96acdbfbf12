"""DeepSpeed as the engine: ZeRO stages 1 to 3 by the names that XTuner has for them."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seq1f1b.ulysses.training.engine import parameter_groups
from seq1f1b.ulysses.training.recipe import Recipe, RecipeError

_ON_HOST = {"device": "cpu", "pin_memory": True}
_STAGES: dict[str, dict[str, Any]] = {
    "deepspeed_zero1": {"stage": 1},
    "deepspeed_zero2": {"stage": 2},
    "deepspeed_zero2_offload": {"stage": 2, "offload_optimizer": _ON_HOST},
    "deepspeed_zero3": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "deepspeed_zero3_offload": {
        "stage": 3,
        "offload_optimizer": _ON_HOST,
        "offload_param": _ON_HOST,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
_AUTO = "auto"
_PIP = 'pip install "deepspeed>=0.19"'


def read_deepspeed(name_or_file: str, recipe: Recipe, accumulation: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a recipe, from a name above or a JSON file.

    Values "auto" and missing ones are the recipe's; others must not contradict it. Raises
    RecipeError, also when DeepSpeed is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(
            f"--deepspeed: DeepSpeed is not installed: {_PIP}. {_without(name_or_file)}"
        )
    config = _read(name_or_file)
    ours = {
        "train_micro_batch_size_per_gpu": recipe.training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": recipe.training.max_grad_norm or 0.0,
    }
    for key, value in ours.items():
        theirs = config.get(key, _AUTO)
        if theirs not in (_AUTO, value):
            raise RecipeError(
                f"--deepspeed: {key} is {theirs!r} in {name_or_file}, and {value!r} by the recipe; "
                f'leave it out or say "auto"'
            )
        config[key] = value
    for key in ("optimizer", "scheduler", "sequence_parallel_size"):
        if key in config:
            raise RecipeError(
                f"--deepspeed: {key} in {name_or_file} is the recipe's affair; leave it out"
            )
    is_half = recipe.model.dtype == "bfloat16"
    config["bf16"] = {"enabled": is_half}
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("steps_per_print", sys.maxsize)
    return config


def _read(name_or_file: str) -> dict[str, Any]:
    if name_or_file in _STAGES:
        stage = json.loads(json.dumps(_STAGES[name_or_file]))
        if not torch.cuda.is_available():
            for key in ("offload_optimizer", "offload_param"):
                stage.pop(key, None)  # everything is in host memory already
        return {"zero_optimization": stage}
    path = Path(name_or_file)
    if not path.is_file():
        raise RecipeError(
            f"--deepspeed: {name_or_file} is neither a file nor one of {', '.join(_STAGES)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RecipeError(f"--deepspeed: {path}: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"--deepspeed: {path} holds no object")
    return config


def _without(name: str) -> str:
    """Return what does the same without DeepSpeed."""
    if name.endswith("_offload"):
        return "FSDP2 does the same: leave --deepspeed out and set memory.cpu_offload: true"
    return "FSDP2 shards weights, gradients and optimizer like ZeRO-3: leave --deepspeed out"


class DeepSpeedEngine:
    """See ``engine.Engine``."""

    def __init__(self, model: nn.Module, recipe: Recipe, config: dict[str, Any]) -> None:
        deepspeed = load_deepspeed()
        settings = recipe.training
        optimizer = torch.optim.AdamW(
            parameter_groups(model.named_parameters(), settings.weight_decay),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
        )
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.model = self._engine
        self._stage = config["zero_optimization"]["stage"]
        self._accumulation = config["gradient_accumulation_steps"]

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See Engine; the mean over micro-batches that DeepSpeed takes is made a sum again."""
        self._engine.backward(loss * self._accumulation)
        if not is_last:
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """See Engine."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def save(self, folder: Path) -> None:
        """See Engine."""
        self._engine.save_checkpoint(str(folder), tag="deepspeed")

    def load(self, folder: Path) -> None:
        """See Engine; the number of ranks must be the same."""
        found, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if found is None:
            raise RecipeError(
                f"--resume: {folder} holds no checkpoint of DeepSpeed for {dist.get_world_size()} "
                f"ranks; continue on as many as wrote it, and with --deepspeed as then"
            )

    def whole_weights(self) -> dict[str, Any]:
        """See Engine."""
        if self._stage == 3:
            weights = self._engine._zero3_consolidated_16bit_state_dict()
        else:
            weights = self._engine.module.state_dict()
        return {k: x.cpu() for k, x in weights.items()} if dist.get_rank() == 0 else {}


def load_deepspeed() -> Any:
    """Return deepspeed, told to stay on the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        # It would compile a shared-memory kernel for minutes, for collectives that gloo has.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed
