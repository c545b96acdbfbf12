"""Small models of every family, and how tests convert them."""

import torch
from safetensors import safe_open
from typer.testing import CliRunner

from seq1f1b_tools.checkpoint.convert import app

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3, "head_dim": 12}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, biases of attention": ("Llama", {"attention_bias": True}),
    "llama, biases of the MLP": ("Llama", {"mlp_bias": True}),
    "llama, linear scaling": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 32, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen2_moe, dense layers": (
        "Qwen2Moe",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3_moe, every second": ("Qwen3Moe", {**_EXPERTS, "decoder_sparse_step": 2}),
    "deepseek_v2": (
        "DeepseekV2",
        {**_LATENT, "q_lora_rank": 12, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v2, groups": (
        "DeepseekV2",
        {
            **_LATENT,
            "q_lora_rank": 12,
            "first_k_dense_replace": 0,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "rope_parameters": _YARN,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_LATENT,
            "q_lora_rank": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": _YARN | {"mscale": 1.0},
        },
    ),
}


def convert(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def converted(*arguments):
    run = convert(*arguments)
    assert run.exit_code == 0, run.stderr[-3000:]
    return run


def make(name, folder, **settings):
    """Save a random model of a family as Hugging Face does, and return it."""
    import transformers

    kind, extra = FAMILIES[name]
    torch.manual_seed(list(FAMILIES).index(name))
    config = getattr(transformers, f"{kind}Config")(**SIZES | extra | settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        elif "gate.weight" in parameter_name:
            torch.nn.init.normal_(parameter)
    for buffer_name, buffer in model.named_buffers():
        if "correction_bias" in buffer_name:
            torch.nn.init.normal_(buffer, std=0.3)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def tensors_of(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors


def flags_of(folder):
    return (folder / "megatron_flags.txt").read_text().splitlines()
