"""Small models of every family that sequence parallelism covers, with all kinds of their layers.

Configurations are transformers' own defaults, shrunk as ``seq1f1b ulysses check`` shrinks a user's.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from seq1f1b.ulysses.randomise import randomise
from seq1f1b.ulysses.shrink import shrink


@dataclass(frozen=True)
class Family:
    """settings: what differs from the default configuration of the model type, after shrinking.

    as_one_row: position scaling follows the longest position of the row, so a packed row is not the
    same as its documents alone; transformers' own whole row is the reference.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    implementation: str = "eager"
    as_one_row: bool = False

    def build(self) -> nn.Module:
        """Return the model in evaluation mode, with the same weights every time."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = shrink(AutoConfig.for_model(self.model_type, **_defaults(self.model_type)))
            values = {**config.to_dict(), **self.settings}
            values.pop("model_type")
            config = type(config)(**values)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=self.implementation
            )
        return randomise(model.float().eval())


def _defaults(model_type: str) -> dict[str, Any]:
    """Return what the default configuration lacks to build a model at all."""
    return {
        "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        "hunyuan_v1_dense": {"head_dim": 16},
        "hunyuan_v1_moe": {"head_dim": 16},
        "ministral": {"head_dim": 16},
        "lfm2_moe": {
            "layer_types": ["conv", "full_attention"],
            "num_hidden_layers": 2,
            "num_dense_layers": 1,
        },
        "nemotron": {"num_key_value_heads": 8, "head_dim": 16},
    }.get(model_type, {})


_ROPE = {"rope_theta": 10000.0}
_DYNAMIC = {**_ROPE, "rope_type": "dynamic", "factor": 4.0}
_YARN = {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    **_ROPE,
    "rope_type": "longrope",
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
_HEADS = "num_attention_heads"
_KV_HEADS = "num_key_value_heads"

_AS_THEY_COME = """
afmoe apertus arcee bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2 deepseek_v3
diffllama ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3_text
gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granite granitemoe
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe internlm3 jetmoe lfm2_moe
llama llama4_text minicpm3 minimax_m2 ministral mistral mixtral nanochat nemotron olmo
olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 stablelm starcoder2
vaultgemma
"""

FAMILIES: dict[str, Family] = {
    **{name: Family(name) for name in _AS_THEY_COME.split()},
    "starcoder2, windows": Family("starcoder2", {"sliding_window": 7}),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "falcon": Family(
        "falcon", {"hidden_size": 80, "num_attention_heads": 5}, implementation="sdpa"
    ),
    "gemma3n_text": Family("gemma3n_text", {"activation_sparsity_pattern": [0.0] * 10}),
    "granitemoehybrid": Family("granitemoehybrid", {"layer_types": ["attention"] * 2}),
    "minimax": Family("minimax", {"layer_types": ["full_attention"] * 2}),
    "llama, GQA": Family("llama", {_KV_HEADS: 2}),
    "llama, MQA": Family("llama", {_KV_HEADS: 1}),
    "llama, 3 heads": Family("llama", {"hidden_size": 48, _HEADS: 3, _KV_HEADS: 3}),
    "llama, 6 heads, 2 of keys": Family("llama", {"hidden_size": 96, _HEADS: 6, _KV_HEADS: 2}),
    "llama, YaRN": Family("llama", {"rope_parameters": _YARN}),
    "llama, dynamic RoPE": Family(
        "llama", {"max_position_embeddings": 8, "rope_parameters": _DYNAMIC}, as_one_row=True
    ),
    "phi3, LongRoPE": Family(
        "phi3",
        {"original_max_position_embeddings": 32, "rope_parameters": _LONG},
        as_one_row=True,
    ),
    "qwen2, windows": Family(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral, auxiliary loss": Family("mixtral", {"output_router_logits": True}),
    "gpt_oss, auxiliary loss": Family("gpt_oss", {"output_router_logits": True}),
}

FAST = (
    "llama, GQA",
    "llama, 3 heads",
    "llama, dynamic RoPE",
    "deepseek_v3",
    "falcon",
    "gemma3_text",
    "gpt_oss, auxiliary loss",
    "lfm2",
    "llama4_text",
    "mistral",
    "phi3, LongRoPE",
    "qwen3_next",
)
