"""A small model of the same make: every kind of layer, few of each, narrow, with short windows."""

import copy
import json
from collections.abc import Iterable
from typing import Any

VOCABULARY, HEAD, LATENT, WIDE = 128, 16, 16, 64
WINDOW, CHUNK, TOP_K, SHORT, LONG = 7, 6, 8, 32, 512
_TINY_WIDTH, _TINY_VOCABULARY, _TINY_LAYERS = 256, 1024, 8

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TO = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("ffn_dim", "n_inner", "ffn_hidden_size", "block_ff_dim", "dff"), WIDE),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), LATENT),
    **dict.fromkeys(("laurel_rank", "hidden_size_per_layer_input", "qk_rope_head_dim"), 8),
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": CHUNK,
    "floor_scale": 8,
    "index_topk": TOP_K,
    "query_pre_attn_scalar": HEAD,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
}
"""Values that replace larger ones."""

_PERIODS = (
    "attn_layer_period",
    "expert_layer_period",
    "decoder_sparse_step",
    "moe_layer_freq",
    "moe_layer_interval",
    "interleave_moe_layer_step",
    "global_attn_every_n_layers",
    "layer_group_size",
    "hybrid_layer_ratio",
)
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_OVERRIDES = "per_layer_config"
_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "full_attention_layers")


def is_tiny(config: Any) -> bool:
    """Whether a model of this configuration builds and runs in a moment as it is."""
    values = config.to_dict()
    limits = (
        (_WIDTHS, _TINY_WIDTH),
        (("vocab_size", "padded_vocab_size"), _TINY_VOCABULARY),
        (_LAYERS, _TINY_LAYERS),
    )
    return all(
        any(isinstance(values.get(n), int) and values[n] <= most for n in names)
        for names, most in limits
    )


def shrink(config: Any) -> Any:
    """Return a small configuration of the same class; ``config`` itself is left as it is.

    Layers: one of each kind, at least two, in their order. Heads of queries and keys keep their
    ratio. Windows, chunks and lengths of position scaling become short enough for a row of some
    dozen tokens to feel them. A configuration that is tiny already is copied.
    """
    if is_tiny(config):
        return copy.deepcopy(config)
    values = config.to_dict()
    for key in (
        "transformers_version",
        "model_type",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
    ):
        values.pop(key, None)
    if isinstance(values.get("text_config"), dict) and not _find(values, _WIDTHS):
        text = shrink(config.text_config)
        return type(config)(**{**values, "text_config": text.to_dict()})
    changes = {**_fewer_layers(values), **_narrower(values)}
    changes |= _shorter_positions(values, {**values, **changes})
    for name, value in values.items():
        if "drop" in name and isinstance(value, float):
            changes[name] = 0.0
        if name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            changes[name] = VOCABULARY - 1
    if isinstance(values.get("eos_token_id"), list):
        changes["eos_token_id"] = 2
    return type(config)(**{**values, **changes})


def fingerprint(config: Any) -> str:
    """Return what tells configurations of one class apart."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def _find(values: dict[str, Any], names: Iterable[str]) -> str:
    """Return the first of the names that has a number; an empty string if none has."""
    return next((name for name in names if isinstance(values.get(name), int)), "")


def _fewer_layers(values: dict[str, Any]) -> dict[str, Any]:
    name = _find(values, _LAYERS)
    if not name:
        return {}
    count = values[name]
    lists = {k: x for k, x in values.items() if isinstance(x, list) and len(x) == count > 1}
    kept = _kept_layers(values, count, lists)
    changes: dict[str, Any] = {name: len(kept)}
    changes |= {key: [x[i] for i in kept] for key, x in lists.items()}
    for key in _FIRST_LAYERS:
        if isinstance(values.get(key), int):
            changes[key] = sum(i < values[key] for i in kept)
    if isinstance(values.get("moe_layer_end_index"), int):
        changes["moe_layer_end_index"] = len(kept) - 1
    for key in _INDEX_LISTS:
        if isinstance(values.get(key), list) and key not in lists:
            changes[key] = [kept.index(i) for i in values[key] if i in kept]
    if values.get("num_kv_shared_layers"):
        changes["num_kv_shared_layers"] = len(kept) // 2
    if isinstance(values.get(_OVERRIDES), dict):
        changes[_OVERRIDES] = {
            kept.index(int(i)): {**x, **_narrower(x), **_head_sizes(x, {})}
            for i, x in values[_OVERRIDES].items()
            if int(i) in kept
        }
    return changes


def _kept_layers(values: dict[str, Any], count: int, lists: dict[str, list[Any]]) -> list[int]:
    """Return the layers to keep: one of each kind, or a run that holds whole periods."""

    def kind(i: int) -> str:
        facts: list[Any] = [x[i] for key, x in sorted(lists.items()) if key not in _INDEX_LISTS]
        facts += [i < values[key] for key in _FIRST_LAYERS if isinstance(values.get(key), int)]
        facts += [i in values[key] for key in _INDEX_LISTS if isinstance(values.get(key), list)]
        facts += [x for k, x in (values.get(_OVERRIDES) or {}).items() if int(k) == i]
        return json.dumps(facts, default=str)

    kinds = [kind(i) for i in range(count)]
    periods = [values[key] for key in _PERIODS if isinstance(values.get(key), int)]
    if max(periods, default=1) > 1 or values.get("num_kv_shared_layers"):
        longest = max([*periods, 2])
        all_kinds = max(kinds.index(k) for k in set(kinds)) + 1
        run = -(-max(all_kinds, longest) // longest) * longest
        if values.get("num_kv_shared_layers"):
            period = next((n for n in range(1, count) if kinds[n] == kinds[0] != kinds[n - 1]), 1)
            run = 2 * period
        return list(range(min(run, count)))
    kept = sorted(kinds.index(k) for k in set(kinds))
    return kept if len(kept) > 1 or count == 1 else [kept[0], min(kept[0] + 1, count - 1)]


def _narrower(values: dict[str, Any]) -> dict[str, Any]:
    changes = {
        key: min(value, _TO[key])
        for key, value in values.items()
        if key in _TO and isinstance(value, int) and not isinstance(value, bool)
    }
    for key, value in values.items():
        if "intermediate_size" in key and isinstance(value, int):
            changes[key] = min(value, WIDE)
        elif "intermediate_size" in key and isinstance(value, list):
            changes[key] = WIDE
        if key in _EXPERTS and isinstance(value, int):
            changes[key] = min(value, 4)
    heads, kv_heads = _find(values, _HEADS), _find(values, _KV_HEADS)
    if heads:
        pair = _fewer_heads(values[heads], values[kv_heads] if kv_heads else values[heads])
        changes[heads] = pair[0]
        if kv_heads:
            changes[kv_heads] = pair[1]
        changes |= _head_sizes(values, changes)
        for key in _WIDTHS:
            if isinstance(values.get(key), int):
                changes[key] = pair[0] * HEAD
    changes |= _linear_heads(values)
    width, new_width = _find(values, _WIDTHS), 0
    if width:
        new_width = changes.get(width, values[width])
        for key, value in values.items():
            if key not in changes and value == values[width] and key.endswith(("size", "dim")):
                changes[key] = new_width
        changes |= _state_space(values, new_width)
    return changes


def _fewer_heads(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Halve both while they are many and even, then queries alone down to a few per key."""
    while num_heads > 8 and num_heads % 2 == 0 and num_kv_heads % 2 == 0:
        num_heads, num_kv_heads = num_heads // 2, num_kv_heads // 2
    group = num_heads // num_kv_heads
    while num_heads > 12 and group > 2:
        group = group // 2 if group % 2 == 0 else 3
        num_heads = group * num_kv_heads
        if group == 3:
            break
    return num_heads, num_kv_heads


def _head_sizes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    sizes = {}
    rotary = changes.get("qk_rope_head_dim")
    for key in ("head_dim", "kv_channels", "global_head_dim", "swa_head_dim", "v_head_size"):
        if isinstance(values.get(key), int):
            is_rotary = rotary is not None and values[key] == values["qk_rope_head_dim"]
            sizes[key] = rotary if is_rotary else min(values[key], HEAD)
    if isinstance(values.get("qk_head_dim"), int):
        sizes["qk_head_dim"] = changes["qk_nope_head_dim"] + changes["qk_rope_head_dim"]
    if isinstance(values.get("rotary_dim"), int):
        sizes["rotary_dim"] = min(values["rotary_dim"], HEAD // 2)
    return sizes


def _linear_heads(values: dict[str, Any]) -> dict[str, Any]:
    keys, heads = "linear_num_key_heads", "linear_num_value_heads"
    if not isinstance(values.get(keys), int) or not isinstance(values.get(heads), int):
        return {}
    ratio = max(values[heads] // values[keys], 1)
    return {keys: min(values[keys], 2), heads: min(values[keys], 2) * ratio}


def _state_space(values: dict[str, Any], width: int) -> dict[str, Any]:
    if not isinstance(values.get("mamba_n_heads"), int):
        return {}
    inner = int(values.get("mamba_expand", 2) * width)
    changes = {"mamba_n_heads": 4, "mamba_d_head": inner // 4, "mamba_d_state": 16}
    if isinstance(values.get("mamba_n_groups"), int):
        changes["mamba_n_groups"] = 1
    if isinstance(values.get("mamba_d_ssm"), int):
        changes["mamba_d_ssm"] = inner
    return changes


def _shorter_positions(values: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    scaled = "dynamic" in str(values.get("rope_parameters"))
    changes: dict[str, Any] = {
        key: min(values[key], SHORT if scaled and "position" in key else LONG)
        for key in _POSITIONS
        if isinstance(values.get(key), int)
    }
    if isinstance(values.get("original_max_position_embeddings"), int):
        changes["original_max_position_embeddings"] = SHORT
    if isinstance(values.get("rope_parameters"), dict):
        head = new.get("head_dim") or HEAD
        changes["rope_parameters"] = _shorter_rope(values["rope_parameters"], head)
    return changes


def _shorter_rope(parameters: dict[str, Any], head: int) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            new[key] = _shorter_rope(value, head)
        elif key == "original_max_position_embeddings":
            new[key] = SHORT
        elif key in ("short_factor", "long_factor"):
            wanted = int(head * parameters.get("partial_rotary_factor", 1.0)) // 2
            new[key] = [value[i * len(value) // wanted] for i in range(wanted)]
        elif key == "mrope_section":
            rest = head // 2 - 2 * (head // 6)
            new[key] = [rest, head // 6, head // 6]
        else:
            new[key] = value
    return new
