"""Megatron's flags for a model, as a file of one token a line and as the arguments they become."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from seq1f1b_tools.checkpoint.families import Experts, Latent, Shape

# flags whose argument has another name
_ARGUMENTS = {"--norm-epsilon": "layernorm_epsilon", "--disable-bias-linear": "add_bias_linear"}

Flags = Mapping[str, Any]
"""Values by flag; True for flags without a value."""


def padded(vocabulary: int, tensor_parallel: int) -> int:
    """Return the least multiple of ``tensor_parallel`` that ``vocabulary`` fits into."""
    return math.ceil(vocabulary / tensor_parallel) * tensor_parallel


def megatron_flags(shape: Shape, vocabulary: int) -> Flags:
    """Return the flags that make Megatron's model this one, with an embedding of ``vocabulary``."""
    flags: dict[str, Any] = {
        "--num-layers": shape.layers,
        "--hidden-size": shape.hidden,
        "--ffn-hidden-size": shape.ffn,
        "--num-attention-heads": shape.heads,
        "--max-position-embeddings": shape.positions,
        "--position-embedding-type": "rope",
        "--normalization": "RMSNorm",
        "--norm-epsilon": shape.norm_epsilon,
        "--swiglu": True,
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--vocab-size": shape.vocabulary,
        "--padded-vocab-size": vocabulary,
        **shape.rope.flags(),
    }
    if shape.latent is None:
        flags |= {
            "--group-query-attention": True,
            "--num-query-groups": shape.groups,
            "--kv-channels": shape.head,
        }
    else:
        flags |= _latent(shape.latent, shape.rope.kind)
    if not shape.has_bias:
        flags["--disable-bias-linear"] = True
    if shape.has_qkv_bias:
        flags["--add-qkv-bias"] = True
    if shape.has_qk_norm:
        flags["--qk-layernorm"] = True
    if not shape.is_tied:
        flags["--untie-embeddings-and-output-weights"] = True
    if shape.experts is not None:
        flags |= _experts(shape.experts)
    return flags


def _latent(latent: Latent, kind: str) -> Flags:
    return {
        "--multi-latent-attention": True,
        "--q-lora-rank": latent.query,
        "--kv-lora-rank": latent.key_value,
        "--qk-head-dim": latent.unrotated,
        "--qk-pos-emb-head-dim": latent.rotated,
        "--v-head-dim": latent.value,
        "--qk-layernorm": True,
        "--rope-type": "yarn" if kind == "yarn" else "rope",
    }


def _experts(experts: Experts) -> Flags:
    flags: dict[str, Any] = {
        "--num-experts": experts.number,
        "--moe-ffn-hidden-size": experts.ffn,
        "--moe-router-topk": experts.routed,
        "--moe-router-score-function": experts.score,
        "--moe-token-dispatcher-type": "alltoall",
    }
    if not experts.in_every_layer:
        flags["--moe-layer-freq"] = [int(is_sparse) for is_sparse in experts.is_sparse]
    if experts.pre_softmax:
        flags["--moe-router-pre-softmax"] = True
    if experts.shared_ffn:
        flags["--moe-shared-expert-intermediate-size"] = experts.shared_ffn
    if experts.has_shared_gate:
        flags["--moe-shared-expert-gate"] = True
    if experts.has_bias:
        flags["--moe-router-enable-expert-bias"] = True
    if experts.scaling != 1:
        flags["--moe-router-topk-scaling-factor"] = experts.scaling
    if experts.groups is not None:
        flags["--moe-router-num-groups"] = experts.groups
        flags["--moe-router-group-topk"] = experts.routed_groups
    if experts.in_float32:
        flags["--moe-router-dtype"] = "fp32"
    return flags


def tokens(flags: Flags) -> list[str]:
    """Return the words of a command line."""
    return list(_words(flags))


def _words(flags: Flags) -> Iterator[str]:
    for flag, value in flags.items():
        yield flag
        if isinstance(value, list):
            yield f"[{','.join(map(str, value))}]"
        elif value is not True:
            yield str(value)


def arguments(flags: Flags) -> dict[str, Any]:
    """Return ``flags`` as the attributes that Megatron parses them to."""
    named = {
        _ARGUMENTS.get(flag, flag.removeprefix("--").replace("-", "_")): value
        for flag, value in flags.items()
    }
    return named | {"add_bias_linear": "--disable-bias-linear" not in flags}
