"""Megatron's options for a Hugging Face model, from its config.json."""

from collections.abc import Callable, Mapping
from typing import Any

from seq1f1b.planner.errors import DataFileError

_Config = Mapping[str, Any]

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
_DEEPSEEK = ("deepseek_v2", "deepseek_v3")
_HAS_QK_NORM = ("qwen3", "qwen3_moe")
_HAS_QKV_BIAS = ("qwen2", "qwen2_moe")


def options_of_config(config: _Config, source: str) -> dict[str, Any]:
    """Return fields of ``Arguments`` for a configuration.

    ``source`` is named in errors. Raises DataFileError for a family that is not known here, and for
    a field that is missing or of a kind that Megatron does not have.
    """
    family = config.get("model_type")
    if family == "gpt2":
        return _gpt2(config, source)
    if family not in _LLAMA_LIKE + _DEEPSEEK:
        raise DataFileError(
            f"{source}: model_type {family!r} is not known; known are "
            f"{', '.join(('gpt2', *_LLAMA_LIKE, *_DEEPSEEK))}. Give Megatron's options instead"
        )
    values = _llama_like(config, source, str(family))
    if family in _DEEPSEEK:
        values |= _latent(config, source)
    experts = _EXPERTS.get(str(family))
    if experts is not None:
        values |= experts(config, source)
    return values


def _need(config: _Config, source: str, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataFileError(f"{source}: {name}: {value!r} is not a number from 1")
    return value


def _gpt2(config: _Config, source: str) -> dict[str, Any]:
    return {
        "num_layers": _need(config, source, "n_layer"),
        "hidden_size": _need(config, source, "n_embd"),
        "num_attention_heads": _need(config, source, "n_head"),
        "ffn_hidden_size": config.get("n_inner"),
        "vocab_size": _need(config, source, "vocab_size"),
        "hidden_dropout": float(config.get("resid_pdrop", 0.1)),
        "attention_dropout": float(config.get("attn_pdrop", 0.1)),
    }


def _llama_like(config: _Config, source: str, family: str) -> dict[str, Any]:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise DataFileError(f"{source}: hidden_act {activation!r}: only silu is known")
    if config.get("sliding_window") and config.get("use_sliding_window", family == "mistral"):
        raise DataFileError(
            f"{source}: sliding_window {config['sliding_window']}: windowed attention is not "
            "modelled"
        )
    heads = _need(config, source, "num_attention_heads")
    values: dict[str, Any] = {
        "num_layers": _need(config, source, "num_hidden_layers"),
        "hidden_size": _need(config, source, "hidden_size"),
        "num_attention_heads": heads,
        "ffn_hidden_size": _need(config, source, "intermediate_size"),
        "vocab_size": _need(config, source, "vocab_size"),
        "swiglu": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "hidden_dropout": 0.0,
        "attention_dropout": float(config.get("attention_dropout", 0.0)),
        "add_qkv_bias": bool(config.get("attention_bias", family in _HAS_QKV_BIAS)),
        "qk_layernorm": family in _HAS_QK_NORM,
    }
    groups = config.get("num_key_value_heads") or heads
    if groups != heads and family not in _DEEPSEEK:
        values |= {"group_query_attention": True, "num_query_groups": groups}
    if config.get("head_dim") and family not in _DEEPSEEK:
        values["kv_channels"] = _need(config, source, "head_dim")
    return values


def _latent(config: _Config, source: str) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": _need(config, source, "kv_lora_rank"),
        "qk_head_dim": _need(config, source, "qk_nope_head_dim"),
        "qk_pos_emb_head_dim": _need(config, source, "qk_rope_head_dim"),
        "v_head_dim": _need(config, source, "v_head_dim"),
        "qk_layernorm": True,
        "mtp_num_layers": config.get("num_nextn_predict_layers") or None,
    }


def _mixtral(config: _Config, source: str) -> dict[str, Any]:
    return {
        "num_experts": _need(config, source, "num_local_experts"),
        "moe_router_topk": _need(config, source, "num_experts_per_tok"),
        "moe_token_dispatcher_type": "alltoall",
    }


def _qwen_experts(config: _Config, source: str) -> dict[str, Any]:
    layers = _need(config, source, "num_hidden_layers")
    dense, step = set(config.get("mlp_only_layers") or ()), config.get("decoder_sparse_step", 1)
    pattern = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)]
    return {
        "num_experts": _need(
            config, source, "num_experts" if "num_experts" in config else "num_local_experts"
        ),
        "moe_router_topk": _need(config, source, "num_experts_per_tok"),
        "moe_ffn_hidden_size": _need(config, source, "moe_intermediate_size"),
        "moe_shared_expert_intermediate_size": config.get("shared_expert_intermediate_size"),
        "moe_layer_freq": 1 if all(pattern) else str(pattern).replace(" ", ""),
        "moe_token_dispatcher_type": "alltoall",
    }


def _deepseek_experts(config: _Config, source: str) -> dict[str, Any]:
    layers = _need(config, source, "num_hidden_layers")
    dense = config.get("first_k_dense_replace", 0)
    width = _need(config, source, "moe_intermediate_size")
    shared = config.get("n_shared_experts") or 0
    return {
        "num_experts": _need(config, source, "n_routed_experts"),
        "moe_router_topk": _need(config, source, "num_experts_per_tok"),
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": shared * width or None,
        "moe_layer_freq": f"[0]*{dense}+[1]*{layers - dense}" if dense else 1,
        "moe_token_dispatcher_type": "alltoall",
    }


_EXPERTS: dict[str, Callable[[_Config, str], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_experts,
    "qwen3_moe": _qwen_experts,
    "deepseek_v2": _deepseek_experts,
    "deepseek_v3": _deepseek_experts,
}
