"""What models of each family are made of, as entries of Megatron's configuration and layer spec."""

from torch.nn.functional import silu

LLAMA = {
    "gated_linear_unit": True,
    "activation_func": silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
LATENT = {
    **LLAMA,
    "multi_latent_attention": True,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "qk_layernorm": True,
    "rope_type": "rope",
}
RMS_NORM = {"normalization": "RMSNorm"}
LATENT_SPEC = {**RMS_NORM, "multi_latent_attention": True, "qk_layernorm": True}


def full(method: str, num_layers: int) -> dict[str, object]:
    """Recompute whole layers, ``num_layers`` at a time or of each chunk."""
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": num_layers,
    }


def selective(*modules: str) -> dict[str, object]:
    """Recompute these modules of every layer."""
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
