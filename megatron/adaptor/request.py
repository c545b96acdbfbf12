"""Settings without a command line: what ``enable`` was given, for the model of a step."""

import argparse
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from megatron.adaptor.command_line.flags import (
    MEGATRON_ATTENTION,
    SCHEDULES,
    SPLITTING_SCHEDULES,
    add_arguments,
)
from megatron.adaptor.command_line.refusals import settings_from
from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.ranks import check_same
from megatron.adaptor.step.read_ahead import Packing, Source
from megatron.adaptor.step.step import StepArguments
from seq1f1b.attention.kernels import KERNELS
from seq1f1b.sequence import BALANCE_METHODS

_DOCUMENTS = tuple(name for name in get_args(Source) if name != "tokens")
_FLAG = re.compile(r"--(?:seq1f1b-)?([a-z][a-z0-9-]*)(?: (\d+)\b)?")


@dataclass(frozen=True)
class Request:
    """The arguments of ``enable``, by which see them; raises ValueError with every wrong one."""

    splits: int
    balance_method: str
    schedule: str
    attention: str | None
    lengths: tuple[int, ...] | None
    multiple: int
    max_live: int | None
    documents: str | None
    verify: bool
    recompute_loss: bool
    timeout_minutes: float

    def __post_init__(self) -> None:
        if faults := list(self._faults()):
            raise ValueError(_listed(faults))

    @property
    def runs_executor(self) -> bool:
        """Whether the executor of Seq1F1B will run the steps."""
        return self.splits > 1 or self.schedule != "auto" or self.documents is not None

    @property
    def splits_backwards(self) -> bool:
        """Whether weight gradients will be computed by actions of their own."""
        return self.schedule in SPLITTING_SCHEDULES

    def settings(self, step: StepArguments) -> Settings:
        """Return what this request means for the model of ``step``; all its ranks must call.

        Raises ValueError with everything that cannot go with sub-sequences, by the names of
        Megatron's TransformerConfig.
        """
        args = _arguments(self, step)
        settings, faults = settings_from(args)
        faults += _engine_faults(step)
        if faults:
            raise ValueError(_listed(map(_as_keywords, faults)))
        ours = {"what enable() was given": repr(self), "the model": repr(settings.cost)}
        for group in (step.groups.pp, step.groups.tp):
            check_same(ours, group)
        return settings

    def _faults(self) -> Iterator[str]:
        if type(self.splits) is not int or self.splits < 1:
            yield f"splits={self.splits!r}: must be a whole number of at least 1"
        for name, allowed in (
            ("balance_method", BALANCE_METHODS),
            ("schedule", SCHEDULES),
            ("attention", (None, *sorted([*KERNELS, MEGATRON_ATTENTION]))),
            ("documents", (None, *_DOCUMENTS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                yield f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}"


def _arguments(request: Request, step: StepArguments) -> argparse.Namespace:
    """Return what Megatron's command line would have said of this model and this step."""
    config, groups = step.config, step.groups
    of_config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    packing = None
    if request.documents is not None:
        packing = Packing(f"documents={request.documents!r}", request.documents)  # type: ignore[arg-type]
    wrappers = {type(chunk).__name__ for chunk in step.chunks}
    return argparse.Namespace(
        **of_config
        | {
            "num_experts": config.num_moe_experts,
            "group_query_attention": config.num_query_groups != config.num_attention_heads,
            "swiglu": config.gated_linear_unit,
            "padded_vocab_size": _vocabulary(step.chunks[0]),
            "transformer_impl": "transformer_engine" if _engine_layers(step) else "local",
            "tensor_model_parallel_size": groups.tp.size(),
            "context_parallel_size": groups.cp.size(),
            "pipeline_model_parallel_size": groups.pp.size(),
            "virtual_pipeline_model_parallel_size": len(step.chunks)
            if len(step.chunks) > 1
            else None,
            "microbatch_group_size_per_vp_stage": _group_size(config, groups.pp.size()),
            "use_megatron_fsdp": "FullyShardedDataParallel" in wrappers,
            "use_torch_fsdp2": "TorchFullyShardedDataParallel" in wrappers,
            "seq_length": step.length,
            "micro_batch_size": step.micro_batch_size,
            "global_batch_size": step.micro_batch_size * step.num_microbatches,
            "data_parallel_size": 1,
            "train_iters": None,
            "distributed_timeout_minutes": request.timeout_minutes,
            "reset_attention_mask": False,
            "reset_position_ids": False,
        }
        | vars(add_arguments(argparse.ArgumentParser()).parse_args([]))
        | {
            "seq1f1b_splits": request.splits,
            "seq1f1b_balance_method": request.balance_method,
            "seq1f1b_schedule": request.schedule,
            "seq1f1b_attention": request.attention,
            "seq1f1b_lengths": request.lengths,
            "seq1f1b_multiple": request.multiple,
            "seq1f1b_max_live": request.max_live,
            "seq1f1b_packing": packing,
            "seq1f1b_verify": request.verify,
            "seq1f1b_recompute_loss": request.recompute_loss,
        }
    )


def _group_size(config: Any, num_stages: int) -> int | None:
    """Return the micro-batches of a turn, or None for as many as stages, Megatron's default."""
    size: int | None = config.microbatch_group_size_per_vp_stage
    return None if size == num_stages else size


def _vocabulary(model: Any) -> int:
    """Return the size that every stage's GPTModel knows; 0 for a model of another kind."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return getattr(model, "vocab_size", 0)


def _engine_layers(step: StepArguments) -> bool:
    return any(
        base.__module__.startswith("transformer_engine.")
        for chunk in step.chunks
        for kind in {type(module) for module in chunk.modules()}
        for base in kind.__mro__
    )


def _engine_faults(step: StepArguments) -> Iterator[str]:
    """Find layers that overwrite gradients; see layers/transformer_engine.py."""
    if _engine_layers(step) and not step.config.disable_parameter_transpose_cache:
        yield (
            "the model was configured before enable() was called, and its transformer-engine "
            "layers would overwrite gradients of sub-sequences: call enable() before the "
            "TransformerConfig is made"
        )


def _as_keywords(message: str) -> str:
    """Write the flags of a message as the names that ``enable`` and TransformerConfig have."""

    def keyword(found: re.Match[str]) -> str:
        name, number = found.groups()
        return name.replace("-", "_") + (f"={number}" if number else "")

    return _FLAG.sub(keyword, message)


def _listed(faults: Any) -> str:
    return "Seq1F1B cannot run with these settings:\n" + "\n".join(f"  - {f}" for f in faults)
