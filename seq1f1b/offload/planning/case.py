"""What is to be planned: a model, a step, a machine, and what of the answer is given."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from seq1f1b.offload.planning.machine import Machine
from seq1f1b.planner.arguments import Arguments, options
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.layout import LayoutError, parse_layout
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import Runtime, runtime
from seq1f1b.planner.setting import DEFAULT_SPLITS, Setting, with_recomputed_loss

_OTHERS = {
    "tensor_model_parallel_size": "one GPU is one pipeline stage here",
    "context_parallel_size": "one GPU is one pipeline stage here",
    "expert_model_parallel_size": "one GPU is one pipeline stage here",
    "expert_tensor_parallel_size": "one GPU is one pipeline stage here",
    "num_layers_per_virtual_pipeline_stage": "give --num-virtual-stages-per-pipeline-rank",
    "decoder_first_pipeline_num_layers": "give --pipeline-model-parallel-layout",
    "decoder_last_pipeline_num_layers": "give --pipeline-model-parallel-layout",
    "account_for_embedding_in_pipeline_split": "give --pipeline-model-parallel-layout",
    "account_for_loss_in_pipeline_split": "give --pipeline-model-parallel-layout",
    "microbatch_group_size_per_vp_stage": "give --turns",
    "seq1f1b_lengths": "give --seq1f1b-splits, and --seq1f1b-balance-method",
    "seq1f1b_max_live": "it belongs to another schedule",
    "overlap_grad_reduce": "it cannot go with --offload-model-chunks",
    "overlap_param_gather": "it cannot go with --offload-model-chunks",
    "use_precision_aware_optimizer": "fp32 states on the host are modelled",
}
"""Arguments that must keep their defaults, and why or what to give instead."""
_FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
_SEARCHED = (
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "micro_batch_size",
    "global_batch_size",
    "seq1f1b_splits",
    "enable_seq1f1b",
)


class Recomputation(StrEnum):
    """What backwards compute anew: layers, their attention, or nothing."""

    FULL = "full"
    SELECTIVE = "selective"
    NONE = "none"


@dataclass(frozen=True)
class Wanted:
    """Numbers of a shape that are given; None for those to be searched."""

    num_chunks: int | None = None
    num_slots: int | None = None
    num_turns: int | None = None
    num_splits: int | None = None
    num_micro_batches: int | None = None
    layout: str | None = None


@dataclass(frozen=True)
class Case:
    """A model and a step, and where it runs.

    base: the model on one stage. rows: sequences of a step. min_tokens: of an action; shorter ones
    are not searched, because rates hold for actions that fill the GPU.
    """

    base: Setting
    rows: int
    machine: Machine
    runtime: Runtime
    min_tokens: int = 1024
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def num_stages(self) -> int:
        """A stage for each GPU."""
        return self.machine.num_gpus

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.base.seq_length


def make_case(
    values: Mapping[str, Any],
    machine: Machine,
    *,
    profile: str = "current",
    recomputation: Recomputation = Recomputation.FULL,
    fp32_gradients: bool = False,
    num_slots: int | None = None,
    num_turns: int | None = None,
    min_tokens: int = 1024,
) -> Case:
    """Return the case that Megatron's options describe, a pipeline over all GPUs.

    values: fields of ``Arguments``; micro-batch size, sub-sequences, virtual stages and their
    layout are searched unless given. ``recomputation`` and ``fp32_gradients`` hold unless an option
    of Megatron's decides.

    Raises SettingError with every fault.
    """
    num_gpus = machine.num_gpus
    faults = list(_faults(values, num_gpus))
    if faults:
        raise SettingError(faults)
    rows = values["global_batch_size"]
    chosen: dict[str, Any] = {"attention_dropout": 0.0}
    chosen["bf16"] = values.get("bf16", not values.get("fp16"))
    if chosen["bf16"] and not fp32_gradients:
        chosen["grad_reduce_in_bf16"] = True
    if not any(values.get(name) for name in ("recompute_granularity", "recompute_activations")):
        if recomputation is Recomputation.FULL:
            chosen |= _FULL
        elif recomputation is Recomputation.SELECTIVE:
            chosen["recompute_granularity"] = "selective"
    given = {name: value for name, value in values.items() if name not in _SEARCHED}
    whole = {"micro_batch_size": 1, "global_batch_size": rows}
    # One split runs in the executor too, because chunks visit, and may recompute its loss.
    anew = given.pop("seq1f1b_recompute_loss", False)
    base = resolve(chosen | given | whole, num_gpus=1)
    base = with_recomputed_loss(base) if anew else base
    wanted = Wanted(
        num_chunks=_num_chunks(values, num_gpus),
        num_slots=num_slots,
        num_turns=num_turns,
        num_splits=_num_splits(values),
        num_micro_batches=_num_micro_batches(values),
        layout=values.get("pipeline_model_parallel_layout"),
    )
    if num_slots and wanted.num_chunks and num_slots > wanted.num_chunks:
        raise SettingError(
            [f"--offload-model-chunks {num_slots}: a stage has {wanted.num_chunks} model chunks"]
        )
    return Case(base, rows, machine, runtime(profile), min_tokens, wanted)


def _faults(values: Mapping[str, Any], num_gpus: int) -> Iterator[str]:
    flags = {option.name: option.flags[0] for option in options()}
    defaults = Arguments()
    for name, why in _OTHERS.items():
        if values.get(name, getattr(defaults, name)) not in (None, 1, getattr(defaults, name)):
            yield f"{flags[name]}: {why}"
    if num_gpus < 2:
        yield f"--gpus {num_gpus}: model chunks need at least 2 stages, a GPU each"
    if values.get("pipeline_model_parallel_size", num_gpus) != num_gpus:
        yield (
            f"--pipeline-model-parallel-size {values['pipeline_model_parallel_size']}: the "
            f"pipeline goes over all {num_gpus} GPUs"
        )
    if values.get("seq1f1b_schedule", "auto") not in ("auto", "1f1b"):
        yield "--seq1f1b-schedule: model chunks visit the GPUs under 1F1B only"
    if values.get("optimizer", "adam") != "adam":
        yield "--optimizer: Adam is modelled"
    for name in ("seq_length", "global_batch_size"):
        if not values.get(name):
            yield f"{flags[name]}: needed to plan a training step"
    yield from _size_faults(values)


def _size_faults(values: Mapping[str, Any]) -> Iterator[str]:
    for flag, name, least in (
        ("--num-virtual-stages-per-pipeline-rank", "num_virtual_stages_per_pipeline_rank", 2),
        ("--seq1f1b-splits", "seq1f1b_splits", 1),
        ("--micro-batch-size", "micro_batch_size", 1),
        ("--global-batch-size", "global_batch_size", 1),
    ):
        value = values.get(name)
        if value is not None and int(value) < least:
            yield f"{flag} {value}: must be at least {least}"
            return
    rows, size = values.get("global_batch_size"), values.get("micro_batch_size")
    if rows and size and rows % size:
        yield f"--global-batch-size {rows}: not a multiple of --micro-batch-size {size}"
    both = ("num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout")
    if all(values.get(name) is not None for name in both):
        yield (
            "--num-virtual-stages-per-pipeline-rank and --pipeline-model-parallel-layout: Megatron "
            "takes one of them"
        )


def _num_chunks(values: Mapping[str, Any], num_gpus: int) -> int | None:
    layout = values.get("pipeline_model_parallel_layout")
    if layout is None:
        return values.get("num_virtual_stages_per_pipeline_rank")
    try:
        num_parts = len(parse_layout(layout))
    except LayoutError as error:
        raise SettingError([str(error)]) from None
    if num_parts % num_gpus or num_parts < 2 * num_gpus:
        raise SettingError(
            [
                f"--pipeline-model-parallel-layout: {num_parts} parts are not 2 or more for each "
                f"of {num_gpus} GPUs"
            ]
        )
    return num_parts // num_gpus


def _num_splits(values: Mapping[str, Any]) -> int | None:
    if values.get("seq1f1b_splits") is not None:
        return int(values["seq1f1b_splits"])
    return DEFAULT_SPLITS if values.get("enable_seq1f1b") else None


def _num_micro_batches(values: Mapping[str, Any]) -> int | None:
    size = values.get("micro_batch_size")
    return values["global_batch_size"] // size if size else None
