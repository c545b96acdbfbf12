"""Checkpoints of a run: complete or not there, the latest ones kept, and the model for use."""

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seq1f1b.ulysses.training.engine import Engine
from seq1f1b.ulysses.training.recipe import RecipeError

_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps done, tokens and targets seen."""

    step: int = 0
    num_tokens: int = 0
    num_targets: int = 0

    def after(self, num_tokens: int, num_targets: int) -> "Progress":
        """Return the progress one step later."""
        return Progress(self.step + 1, self.num_tokens + num_tokens, self.num_targets + num_targets)


class Checkpoints:
    """The folder of a run's checkpoints, ``step-N`` each."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def found(self) -> list[Path]:
        """Return complete checkpoints, the latest last."""
        paths = [p.parent for p in self.folder.glob(f"step-*/{_PROGRESS}")]
        numbered = [(int(name), p) for p in paths if (name := p.name[len("step-") :]).isdecimal()]
        return [path for _, path in sorted(numbered)]

    def save(self, engine: Engine, progress: Progress, facts: dict[str, Any]) -> Path:
        """Write a checkpoint on all ranks; it appears under its name when it is complete.

        facts: of the run, which a run that goes on from here must share.
        """
        path = self.folder / f"step-{progress.step}"
        partial = self.folder / f"step-{progress.step}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save(partial)
        torch.save(_random_state(), partial / f"random-{dist.get_rank()}.pt")
        dist.barrier()
        if dist.get_rank() == 0:
            content = {**asdict(progress), "facts": facts, "ranks": dist.get_world_size()}
            (partial / _PROGRESS).write_text(json.dumps(content, indent=1))
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            for old in self.found()[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()
        return path

    def load(self, path: Path, engine: Engine, facts: dict[str, Any]) -> Progress:
        """Continue from a checkpoint. Raises RecipeError when it is of another run."""
        try:
            content = json.loads((path / _PROGRESS).read_text())
        except OSError:
            raise RecipeError(f"--resume: {path} is no complete checkpoint") from None
        for key, value in content.pop("facts").items():
            if facts.get(key) != value:
                raise RecipeError(
                    f"--resume: {path} was written with {key} {value}, and the recipe says "
                    f"{facts.get(key)}: data order or optimizer would not continue"
                )
        engine.load(path)
        ranks = content.pop("ranks")
        if ranks == dist.get_world_size():
            own = path / f"random-{dist.get_rank()}.pt"
            _set_random_state(torch.load(own, weights_only=False))
        return Progress(**content)


def choose(folder: Path, resume: str | None, checkpoints: Checkpoints) -> Path | None:
    """Return the checkpoint that ``--resume`` asks for; None to start anew.

    Raises RecipeError when there is none, or when a new start would overwrite a run.
    """
    found = checkpoints.found()
    if resume is None:
        if found:
            raise RecipeError(
                f"--work-dir: {folder} holds a run of {found[-1].name}; continue it with --resume, "
                f"or choose another folder"
            )
        return None
    if resume == "auto":
        return found[-1] if found else None
    path = Path(resume)
    if not (path / _PROGRESS).is_file():
        raise RecipeError(f"--resume: {path} is no complete checkpoint")
    return path


def export(engine: Engine, config: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as ``from_pretrained`` reads it: safetensors, configuration, tokenizer."""
    weights = engine.whole_weights()
    if dist.get_rank() == 0:
        model: Any = engine.model
        shared = {name: x.to(torch.float32) for name, x in weights.items()}
        model.save_pretrained(folder, state_dict=shared)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    dist.barrier()


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
