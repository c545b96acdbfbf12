"""What people combine: each choice as Megatron's flags and as a case of the tests' own model."""

import shlex
from dataclasses import dataclass, field, replace
from typing import Any

from tests.distributed.families import LATENT, LATENT_SPEC, LLAMA, RMS_NORM, full, selective
from tests.distributed.megatron_model import BATCH, GROUPS, HEADS, HIDDEN, LAYERS, Case

LENGTH, NUM_MICRO_BATCHES = 32, 4


@dataclass(frozen=True)
class Choice:
    """One way of doing one thing: flags of Megatron's command line, and fields of a ``Case``."""

    flags: str
    case: dict[str, Any] = field(default_factory=dict)


_SWIGLU_FLAGS = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights"
)
_GROUPS = f"--group-query-attention --num-query-groups {GROUPS}"
_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall "
    "--moe-aux-loss-coeff 0.5 --moe-z-loss-coeff 0.1"
)
_LATENT_FLAGS = (
    "--multi-latent-attention --q-lora-rank 12 --kv-lora-rank 8 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 6 --qk-layernorm --rope-type rope"
)
_PP, _TP, _CP, _EP = (
    f"--{kind}-parallel-size"
    for kind in ("pipeline-model", "tensor-model", "context", "expert-model")
)

MATRIX: dict[str, dict[str, Choice]] = {
    "Parallelism": {
        "PP 2": Choice(f"{_PP} 2", {"num_stages": 2}),
        "PP 4": Choice(f"{_PP} 4", {"num_stages": 4}),
        "PP 2, VPP 2": Choice(
            f"{_PP} 2 --num-virtual-stages-per-pipeline-rank 2", {"num_stages": 2, "num_chunks": 2}
        ),
        "PP 2, TP 2": Choice(f"{_PP} 2 {_TP} 2", {"num_stages": 2, "tensor": 2}),
        "PP 2, TP 2, SP": Choice(
            f"{_PP} 2 {_TP} 2 --sequence-parallel",
            {"num_stages": 2, "tensor": 2, "sequence_parallel": True},
        ),
        "PP 2, DP 2": Choice(f"{_PP} 2", {"num_stages": 2, "replicas": 2}),
        "PP 2, DP 2, EP 2": Choice(
            f"{_PP} 2 {_EP} 2", {"num_stages": 2, "replicas": 2, "experts_shared": 2}
        ),
        "PP 2, CP 2": Choice(
            f"{_PP} 2 {_CP} 2 --cp-comm-type a2a", {"num_stages": 2, "context": 2}
        ),
        "PP 2, CP 2 (ring)": Choice(f"{_PP} 2 {_CP} 2", {"num_stages": 2, "context": 2}),
        "PP 2, TP 2, SP, CP 2": Choice(
            f"{_PP} 2 {_TP} 2 --sequence-parallel {_CP} 2 --cp-comm-type a2a",
            {"num_stages": 2, "tensor": 2, "sequence_parallel": True, "context": 2},
        ),
    },
    "Model": {
        "GPT": Choice(
            f"--position-embedding-type learned_absolute {_GROUPS}",
            {"positions": "learned_absolute", "tied": True},
        ),
        "Llama": Choice(f"{_SWIGLU_FLAGS} {_GROUPS}", {"config": LLAMA, "spec": RMS_NORM}),
        "Qwen3": Choice(
            f"{_SWIGLU_FLAGS} {_GROUPS} --qk-layernorm",
            {
                "config": LLAMA | {"qk_layernorm": True},
                "spec": RMS_NORM | {"qk_layernorm": True},
            },
        ),
        "Mixtral": Choice(
            f"{_SWIGLU_FLAGS} {_GROUPS} {_EXPERTS}",
            {"config": LLAMA, "spec": RMS_NORM, "experts": "aux_loss"},
        ),
        "DeepSeek": Choice(
            f"{_SWIGLU_FLAGS} {_LATENT_FLAGS} {_EXPERTS} "
            "--moe-router-load-balancing-type seq_aux_loss",
            {
                "config": LATENT,
                "spec": LATENT_SPEC,
                "experts": "seq_aux_loss",
            },
        ),
        "Llama, multi-token prediction": Choice(
            f"{_SWIGLU_FLAGS} {_GROUPS} --mtp-num-layers 2",
            {"config": LLAMA | {"mtp_num_layers": 2}, "spec": RMS_NORM},
        ),
        "Mamba layers": Choice("--hybrid-layer-pattern M*M*"),
    },
    "Recomputation": {
        "none": Choice(""),
        "full, uniform": Choice(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
            {"config": full("uniform", 1)},
        ),
        "full, block": Choice(
            "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
            {"config": full("block", 1)},
        ),
        "attention": Choice(
            "--recompute-granularity selective --recompute-modules core_attn",
            {"config": selective("core_attn")},
        ),
        "norms": Choice(
            "--recompute-granularity selective --recompute-modules layernorm",
            {"config": selective("layernorm")},
        ),
    },
    "Documents": {
        "one per sample": Choice(""),
        "packed, told apart by tokens": Choice("--reset-attention-mask", {"documents": "tokens"}),
        "packed, told apart by positions": Choice(
            "--reset-attention-mask --reset-position-ids", {"documents": "position_ids"}
        ),
        "packed samples of fine-tuning": Choice("--sft", {"documents": "cu_seqlens"}),
    },
    "Schedule": {
        "1f1b": Choice(""),
        "zb-h1": Choice("--seq1f1b-schedule zb-h1", {"kind": "zb-h1"}),
        "greedy": Choice("--seq1f1b-schedule greedy", {"kind": "greedy"}),
    },
    "Cut": {
        "2, average": Choice(
            "--seq1f1b-splits 2 --seq1f1b-balance-method average",
            {"num_splits": 2, "balance": "average"},
        ),
        "3, uniform_comp": Choice("--seq1f1b-splits 3", {"num_splits": 3}),
        "4, uniform_comp": Choice("--seq1f1b-splits 4", {"num_splits": 4}),
    },
}

BASE = shlex.split(
    f"--num-layers {LAYERS} --hidden-size {HIDDEN} --num-attention-heads {HEADS} "
    f"--seq-length {LENGTH} --max-position-embeddings {LENGTH} --micro-batch-size {BATCH} "
    "--train-iters 4 --hidden-dropout 0 --attention-dropout 0 --transformer-impl local"
)

Row = tuple[str, ...]
"""The name of one choice for each key of MATRIX, in its order."""


def choices(row: Row) -> list[Choice]:
    """Return what the names in ``row`` stand for."""
    return [options[name] for options, name in zip(MATRIX.values(), row, strict=True)]


def flags_of(row: Row) -> list[str]:
    """Return the command line of ``row``."""
    case = case_of(row)
    size = ["--global-batch-size", str(BATCH * NUM_MICRO_BATCHES * case.replicas)]
    return [*BASE, *size, *shlex.split(" ".join(choice.flags for choice in choices(row)))]


def case_of(row: Row) -> Case:
    """Return the step that tests ``row``.

    Megatron's own layers do not sum the gradients of latent attention over tensor-parallel ranks as
    one rank would; there the reference is Megatron's own schedule on the same ranks.
    """
    merged: dict[str, Any] = {"num_splits": 1, "length": LENGTH}
    for choice in choices(row):
        for name, value in choice.case.items():
            merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
    case = Case(num_micro_batches=NUM_MICRO_BATCHES, **merged)
    if case.tensor == 1 or not case.config.get("multi_latent_attention"):
        return case
    # One split under context parallelism takes the mean of its ranks' means, unless told otherwise.
    return replace(case, against_one_split=True, per_token=True)
