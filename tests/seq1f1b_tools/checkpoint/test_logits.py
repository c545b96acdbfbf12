"""Converted checkpoints compute what Hugging Face's models compute."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from seq1f1b_tools.checkpoint.torch_dist_reader import Checkpoint
from tests.seq1f1b_tools.checkpoint.megatron_logits import megatron_logits
from tests.seq1f1b_tools.checkpoint.tiny_models import converted, flags_of, make, tensors_of


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_logits_are_those_of_hugging_face(workers, models, checkpoints):
    tokens = torch.randint(0, 70, (2, 16), generator=torch.Generator().manual_seed(5))
    jobs = [(folder, flags_of(folder)) for folder in checkpoints.values()]
    answers = workers(4).run(megatron_logits, jobs, tokens, 2, 2)
    for number, (name, (_, model)) in enumerate(models.items()):
        read = set().union(*(keys[number] for _, keys in answers))
        assert read == set(Checkpoint(checkpoints[name])._tensors), name
        with torch.no_grad():
            expected = model(tokens).logits
        found = [logits[number] for logits, _ in answers if logits[number] is not None]
        assert len(found) == 2
        for logits in found:
            error = (logits[..., :70] - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, name


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.long
def test_logits_of_unusual_folders_are_those_of_hugging_face(workers, tmp_path):
    """Whatever transformers makes of a folder: defaults, mixed types, old files beside new ones."""
    folders = {name: tmp_path / str(number) for number, name in enumerate(UNUSUAL)}
    for name, folder in folders.items():
        UNUSUAL[name](folder)
        converted("hf-to-megatron", "--hf", folder, "--output", folder / "megatron")
    tokens = torch.randint(0, 70, (2, 16), generator=torch.Generator().manual_seed(7))
    jobs = [(folder / "megatron", flags_of(folder / "megatron")) for folder in folders.values()]
    answers = workers(4).run(megatron_logits, jobs, tokens, 2, 2)
    for number, (name, folder) in enumerate(folders.items()):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = model.eval()(tokens).logits
        found = [logits[number] for logits, _ in answers if logits[number] is not None]
        for logits in found:
            error = (logits[..., : expected.shape[-1]] - expected).abs().max()
            assert error / expected.abs().max() < 1e-5, name


def _bare(name, **settings):
    """Every setting is left out that has a default, but for sizes that tests have to keep small."""

    def save(folder):
        model = make(name, folder, **settings)
        file = folder / "config.json"
        defaults = type(model.config)().to_dict()
        stored = json.loads(file.read_text())
        kept = {k: v for k, v in stored.items() if k not in defaults or v != defaults[k]}
        assert len(kept) < len(stored) - 5
        file.write_text(json.dumps(kept | {"model_type": stored["model_type"]}))

    return save


def _mixed_types(folder):
    make("deepseek_v3", folder)
    tensors = tensors_of(folder)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    in_float32 = ("norm", "gate.weight", "correction_bias")
    mixed = {k: t if any(p in k for p in in_float32) else t.bfloat16() for k, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})


def _stale_shards(folder):
    make("llama", folder)
    stale = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(folder).items()}
    save_file(stale, folder / "model-00099-of-00099.safetensors", metadata={"format": "pt"})


def _tied_in_name_only(folder):
    make("qwen2", folder)
    tensors = tensors_of(folder)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UNUSUAL = {
    "llama, bare": _bare(
        "llama", rope_parameters=None, head_dim=None, num_key_value_heads=4,
        max_position_embeddings=2048,
    ),
    "mistral, bare": _bare(
        "mistral", num_attention_heads=8, num_key_value_heads=8, head_dim=None,
        sliding_window=4096, max_position_embeddings=131072,
    ),
    "mixtral, bare": _bare(
        "mixtral", num_attention_heads=8, num_key_value_heads=8, num_local_experts=8,
        max_position_embeddings=131072,
    ),
    "qwen2, bare": _bare("qwen2", tie_word_embeddings=False, max_position_embeddings=32768),
    "qwen2_moe, bare": _bare("qwen2_moe", num_experts=60, num_experts_per_tok=4),
    "qwen3, bare": _bare("qwen3", head_dim=128, max_position_embeddings=32768),
    "qwen3_moe, bare": _bare(
        "qwen3_moe", num_experts=128, num_experts_per_tok=8, num_key_value_heads=4,
        num_attention_heads=4, norm_topk_prob=False, head_dim=128,
    ),
    "deepseek_v2, bare": _bare(
        "deepseek_v2", first_k_dense_replace=0, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, kv_lora_rank=512, q_lora_rank=1536, n_routed_experts=64,
    ),
    "deepseek_v3, bare": _bare(
        "deepseek_v3", first_k_dense_replace=1, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4,
        rope_parameters=None,
    ),
    "mixed types": _mixed_types,
    "stale shards": _stale_shards,
    "tied in name only": _tied_in_name_only,
}  # fmt: skip
