"""Checkpoints that cannot be loaded end the job with an error, and finished runs say that they are.

Megatron leaves with exit code 0 in both cases of a tracker that names no iteration and of a
checkpoint that lacks something, so a cluster takes the job for a success.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.adaptor.patches import Patch
from seq1f1b.errors import Seq1F1BError

_CHECKPOINTING = "megatron.training.checkpointing"


class CheckpointError(Seq1F1BError, RuntimeError):
    """A checkpoint that cannot be read or written; the message names it and the way out."""


class FinishedError(Seq1F1BError):
    """The checkpoint that was loaded is of the last iteration: there is nothing to train."""


class Loading:
    """Checks what Megatron loads, for the job whose arguments ``arguments`` returns."""

    def __init__(self, arguments: Callable[[], argparse.Namespace | None]) -> None:
        self._arguments = arguments

    def patches(self) -> list[Patch]:
        """Return what is replaced around loading."""
        return [
            Patch(f"{_CHECKPOINTING}:read_metadata", read_metadata),
            Patch(f"{_CHECKPOINTING}:fix_query_key_value_ordering", fix_query_key_value_ordering),
            Patch(f"{_CHECKPOINTING}:_load_base_checkpoint", load_base_checkpoint),
            Patch(f"{_CHECKPOINTING}:load_checkpoint", self.load_checkpoint),
            Patch(
                "megatron.training.training:build_train_valid_test_data_iterators",
                self.build_data_iterators,
            ),
        ]

    def load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Raise an error where Megatron ends the job with exit code 0."""
        try:
            return original(*args, **kwargs)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
            raise _failure(end, f"--load {getattr(self._arguments(), 'load', None)}") from end

    def build_data_iterators(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Say that a run is at its last iteration, before Megatron looks for samples beyond it."""
        found = self._arguments()
        if found is not None and not (found.skip_train or found.perform_rl_step):
            last = found.train_iters or 0
            if 0 < last <= found.iteration:
                raise FinishedError(
                    f"the checkpoint in --load {found.load} is of iteration {found.iteration} and "
                    f"--train-iters is {last}: there is nothing left to train; to evaluate it, "
                    "add --skip-train"
                )
        return original(*args, **kwargs)


def read_metadata(original: Callable[..., Any], tracker_filename: str) -> Any:
    """Raise an error for a tracker that names no iteration, where Megatron's exit code is 0."""
    try:
        return original(tracker_filename)
    except SystemExit as end:
        tracker = Path(tracker_filename)
        text = tracker.read_text(errors="replace").strip()[:40]
        whole = [
            folder.name
            for folder in sorted(tracker.parent.glob("iter_*"))
            if (folder / "metadata.json").is_file()
        ]
        advice = (
            f"the newest checkpoint beside it is {whole[-1]}: write "
            f"{whole[-1].removeprefix('iter_').lstrip('0') or '0'} into the file to load it"
            if whole
            else "there is no checkpoint beside it: leave --load out to start anew"
        )
        raise CheckpointError(
            f"{tracker} {f'says {text!r}' if text else 'is empty'}, where the iteration to load or "
            f"'release' has to be; {advice}"
        ) from end


def fix_query_key_value_ordering(
    original: Callable[..., Any], model: Any, checkpoint_version: Any
) -> None:
    """Raise an error for a version that Megatron does not know, where its exit code is 0."""
    try:
        original(model, checkpoint_version)
    except SystemExit as end:
        raise CheckpointError(
            f"--load: the checkpoint has version {checkpoint_version}, which Megatron does not know"
        ) from end


def load_base_checkpoint(
    original: Callable[..., Any], load_dir: Any, args: Any, *rest: Any, **kwargs: Any
) -> Any:
    """Raise an error where there is no checkpoint, or none that can be read: exit code 0 there."""
    try:
        found = original(load_dir, args, *rest, **kwargs)
    except SystemExit as end:
        if end.__context__ is None:
            raise CheckpointError(
                f"--load {load_dir}: there is no latest_checkpointed_iteration.txt, and so no "
                "checkpoint (--exit-on-missing-checkpoint)"
            ) from end
        raise _failure(end, f"--load {load_dir}") from end
    if found[0]:
        _check_experts(found[0].get("args"), args, f"--load {load_dir}")
    return found


def _check_experts(saved: Any, args: Any, what: str) -> None:
    """Raise an error for an optimizer that keeps experts apart, or that does not, unlike this one.

    Megatron gives experts an optimizer of their own if ranks divide them.
    """
    then, now = (getattr(each, "expert_model_parallel_size", 0) for each in (saved, args))
    if not then or not now or (then > 1) == (now > 1):
        return
    if args.finetune or args.no_load_optim or getattr(saved, "no_save_optim", False):
        return
    allowed = "a size above 1" if then > 1 else "1"
    raise CheckpointError(
        f"{what}: the checkpoint was saved with --expert-model-parallel-size {then}, and its "
        f"optimizer cannot be loaded with {now}: resume with {allowed}, or add --no-load-optim to "
        "start the optimizer anew"
    )


def _failure(end: SystemExit, what: str) -> CheckpointError:
    """Return the error for an end of Megatron's; its cause is what Megatron was handling."""
    cause = end.__context__
    if isinstance(cause, KeyError) and cause.args == ("total_iters",):
        why = "the checkpoint does not say of which iteration it is: load it with --finetune"
    elif isinstance(cause, KeyError):
        why = (
            f"the checkpoint has no random numbers ({cause}): add --no-load-rng, or --finetune to "
            "start anew from its weights"
        )
    else:
        why = f"the checkpoint cannot be read: {type(cause).__name__}: {cause}"
    return CheckpointError(f"{what}: {why}")
