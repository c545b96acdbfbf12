"""Checkpoints of a run: complete or not there, the latest ones kept, and the model for use."""

import json
import random
import shutil
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from seq1f1b.agreement import raise_on_all
from seq1f1b.errors import Seq1F1BError
from seq1f1b.files import cannot_fill, existing_folder, why_full
from seq1f1b.ulysses.training.engine import Engine
from seq1f1b.ulysses.training.recipe import RecipeError

_PROGRESS = "progress.json"
_GIB = 1 << 30
_SECONDS_TO_SEE = 10.0
_SHARED = "all nodes write parts of a checkpoint: put --work-dir on a file system that they share"


class SavingError(Seq1F1BError, RuntimeError):
    """A checkpoint could not be written; the message names it, the cause, and what is complete."""


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

    def require_room(self, checkpoint_bytes: int, num_saves: int, export_bytes: int) -> None:
        """Raise RecipeError, on all ranks, if the disk cannot take what the run will write."""
        fault = ""
        if dist.get_rank() == 0:
            there = len(self.found())
            coming = max(min(there + num_saves, self.keep + 1) - there, min(num_saves, 1))
            needed = coming * checkpoint_bytes + export_bytes
            free = shutil.disk_usage(existing_folder(self.folder)).free
            if needed > free:
                fault = (
                    f"--work-dir: {self.folder.parent} has {free / _GIB:.3g} GiB left for {coming} "
                    f"checkpoint(s) of about {checkpoint_bytes / _GIB:.3g} GiB and an exported "
                    f"model of {export_bytes / _GIB:.3g} GiB: make room, lower checkpoints.keep, "
                    f"or name another folder"
                )
        raise_on_all(fault, RecipeError)

    def save(self, engine: Engine, progress: Progress, facts: dict[str, Any]) -> Path:
        """Write a checkpoint on all ranks; it appears under its name when it is complete.

        facts: of the run, which a run that goes on from here must share. Raises SavingError where
        nothing more can be written.
        """
        path = self.folder / f"step-{progress.step}"
        partial = self.folder / f"step-{progress.step}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            engine.save(partial)
            torch.save(_random_state(), partial / f"random-{dist.get_rank()}.pt")
        except (Exception, CheckpointException) as error:
            why = why_full(self.folder, _cause(error))
            if why is None:
                raise
            kept = ", ".join(found.name for found in self.found()) or "none"
            raise SavingError(
                f"{path} was not saved, because {why}; complete checkpoints beside it: {kept}"
            ) from error
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
        """Continue from a checkpoint. Raises RecipeError when it is damaged or of another run."""
        progress, of_run, ranks = _read_progress(path)
        for key, value in of_run.items():
            if facts.get(key) != value:
                raise RecipeError(
                    f"--resume: {path} was written with {key} {value}, and the recipe says "
                    f"{facts.get(key)}: data order or optimizer would not continue"
                )
        fault = ""
        try:
            engine.load(path)
            if ranks == dist.get_world_size():
                own = path / f"random-{dist.get_rank()}.pt"
                _set_random_state(torch.load(own, weights_only=True))
        except RecipeError as error:
            fault = str(error)
        except (Exception, CheckpointException) as error:  # readers fail in many ways
            cause = _cause(error)
            fault = f"--resume: {path} cannot be loaded: {type(cause).__name__}: {cause}"
        raise_on_all(fault, RecipeError)
        return progress


def _cause(error: BaseException) -> BaseException:
    """Return what the first rank at fault raised, where torch reports those of all ranks."""
    if isinstance(error, CheckpointException) and error.failures:
        return error.failures[min(error.failures)][0]
    return error


def _read_progress(path: Path) -> tuple[Progress, dict[str, Any], int]:
    """Return a checkpoint's progress, the facts of its run, and its number of ranks."""
    try:
        content = json.loads((path / _PROGRESS).read_text())
        facts, ranks = dict(content.pop("facts")), int(content.pop("ranks"))
        return Progress(**{key: int(value) for key, value in content.items()}), facts, ranks
    except OSError:
        raise RecipeError(f"--resume: {path} is no complete checkpoint") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(
            f"--resume: {path / _PROGRESS} is damaged ({type(error).__name__}: {error}); continue "
            "from another checkpoint"
        ) from None


def choose(folder: Path, resume: str | None, checkpoints: Checkpoints) -> Path | None:
    """Return the checkpoint that ``--resume`` asks for, rank 0's on all ranks; None to start anew.

    Raises RecipeError, on all ranks, when there is none, or when a new start would overwrite a run.
    """
    chosen: list[Path | None] = [None]
    fault = ""
    if dist.get_rank() == 0:
        try:
            chosen[0] = _choose(folder, resume, checkpoints)
        except RecipeError as error:
            fault = str(error)
    dist.broadcast_object_list(chosen, src=0)
    (path,) = chosen
    if path is not None and not (path / _PROGRESS).is_file():
        fault = f"--resume: {path} is not here, but where rank 0 runs; {_SHARED}"
    raise_on_all(fault, RecipeError)
    return path


def _choose(folder: Path, resume: str | None, checkpoints: Checkpoints) -> Path | None:
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


def require_shared(folder: Path) -> None:
    """Raise RecipeError, on all ranks, unless all of them see the same ``folder``."""
    why = cannot_fill(folder) if dist.get_rank() == 0 else None
    raise_on_all(f"--work-dir: {folder}: {why}" if why else "", RecipeError)
    names = [f".seen-by-all-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(names, src=0)
    seen = folder / names[0]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        seen.touch()
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # network file systems are late
    fault = f"--work-dir: {folder} is not the folder of rank 0; {_SHARED}"
    try:
        raise_on_all("" if seen.exists() else fault, RecipeError)
    finally:
        if dist.get_rank() == 0:
            seen.unlink(missing_ok=True)


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
