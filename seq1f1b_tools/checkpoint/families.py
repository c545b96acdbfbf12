"""The families of models that are converted: from config.json to shapes and Megatron's flags."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq1f1b_tools.checkpoint.problem import ConversionError

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral")
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder and what it is made of.

    head: width of a head. ffn: width of the MLP, or of one expert. experts: 0 for a dense MLP.
    rope_factor: of Llama 3's scaled RoPE; None without.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    positions: int
    rope_base: float
    norm_epsilon: float
    is_tied: bool
    rope_factor: float | None = None
    experts: int = 0
    routed: int = 0

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.family == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        """Whether each head's query and key are normalised."""
        return self.family == "qwen3"

    def flags(self) -> dict[str, Any]:
        """Return Megatron's flags for this model, by name; True for those without a value."""
        flags: dict[str, Any] = {
            "--num-layers": self.layers,
            "--hidden-size": self.hidden,
            "--ffn-hidden-size": self.ffn,
            "--num-attention-heads": self.heads,
            "--group-query-attention": True,
            "--num-query-groups": self.groups,
            "--kv-channels": self.head,
            "--max-position-embeddings": self.positions,
            "--position-embedding-type": "rope",
            "--rotary-base": int(self.rope_base),
            "--normalization": "RMSNorm",
            "--norm-epsilon": self.norm_epsilon,
            "--swiglu": True,
            "--disable-bias-linear": True,
            "--attention-dropout": 0,
            "--hidden-dropout": 0,
            "--vocab-size": self.vocabulary,
        }
        if self.rope_factor is not None:
            flags |= {"--use-rope-scaling": True, "--rope-scaling-factor": self.rope_factor}
        if self.has_qkv_bias:
            flags["--add-qkv-bias"] = True
        if self.has_qk_norm:
            flags["--qk-layernorm"] = True
        if not self.is_tied:
            flags["--untie-embeddings-and-output-weights"] = True
        if self.experts:
            flags |= {
                "--num-experts": self.experts,
                "--moe-ffn-hidden-size": self.ffn,
                "--moe-router-topk": self.routed,
                "--moe-token-dispatcher-type": "alltoall",
            }
        return flags


def read_shape(folder: Path) -> Shape:
    """Read ``folder/config.json``; raises ConversionError for what cannot be converted."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConversionError(f"{folder} has no config.json: give a Hugging Face model") from None
    except json.JSONDecodeError as error:
        raise ConversionError(f"{file}:{error.lineno}: {error.msg}") from None
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConversionError(
            f"{file}: model_type {family!r} is not converted; {', '.join(FAMILIES)} are"
        )
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise ConversionError(f"{file}: no {', '.join(missing)}")
    for key, value in _UNSUPPORTED.get(family, {}).items():
        if config.get(key, value) not in (value, None):
            raise ConversionError(f"{file}: {key} = {config[key]!r} is not converted")
    rope = _rope(config, file)
    heads = config["num_attention_heads"]
    return Shape(
        family=family,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        rope_base=float(rope["rope_theta"]),
        norm_epsilon=config["rms_norm_eps"],
        is_tied=bool(config.get("tie_word_embeddings", False)),
        rope_factor=rope["factor"] if rope["rope_type"] == "llama3" else None,
        experts=config["num_local_experts"] if family == "mixtral" else 0,
        routed=config["num_experts_per_tok"] if family == "mixtral" else 0,
    )


_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_PLAIN = {"hidden_act": "silu"}
_UNSUPPORTED: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_PLAIN, "attention_bias": False, "mlp_bias": False},
    "qwen2": {**_PLAIN, "use_sliding_window": False},
    "qwen3": {**_PLAIN, "attention_bias": False, "use_sliding_window": False},
    "mixtral": {**_PLAIN, "sliding_window": None},
}


def _rope(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the parameters of rotary positions, which older and newer files keep elsewhere."""
    rope = {
        "rope_type": "default",
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }
    kind = rope["rope_type"] = rope.get("type", rope["rope_type"])
    if kind not in ("default", "llama3"):
        raise ConversionError(f"{file}: RoPE scaling {kind!r} is not converted; 'llama3' is")
    if kind == "llama3":
        for key, value in _LLAMA3_SCALING.items():
            if rope.get(key) != value:
                raise ConversionError(
                    f"{file}: RoPE scaling with {key} = {rope.get(key)}; Megatron has {value}"
                )
    return rope
