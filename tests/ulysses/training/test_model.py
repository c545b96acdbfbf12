"""Configurations of models: what a recipe may say of them, and how RoPE is scaled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from seq1f1b.ulysses.training.model import make_config, refuse_unknown
from seq1f1b.ulysses.training.recipe import RecipeError
from tests.ulysses.families import FAMILIES
from tests.ulysses.training.recipes import recipe

GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


def config(**changes: Any) -> Any:
    return make_config(recipe(Path("texts.jsonl"), sequence_parallel_size=1, **changes), 259)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model.config.hiden_size": 64},
            "hiden_size: llama has no such setting; did you mean hidden",
        ),
        ({"model.config.zebra": 1}, "model.config.zebra: llama has no such setting"),
        (
            {"model.config.hidden_size": "big"},
            "model.config: Field 'hidden_size' expected int, got str",
        ),
        (
            {"model.config.num_attention_heads": 5},
            "is not a multiple of the number of attention heads",
        ),
        (
            {"model.config.rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}},
            "model.config.rope_parameters.rope_type: 'yarm' is none of default, dynamic, linear",
        ),
        ({"rope": {"rope_type": "yarm"}}, "rope.rope_type: 'yarm' is none of default, dynamic"),
        ({"rope": {"rope_type": "yarn"}}, "rope: Missing required keys .*'factor'"),
        (
            {"model.config": GEMMA, "rope": {"chunked": {"rope_type": "linear", "factor": 2.0}}},
            "rope: this model has RoPE for sliding_attention and full_attention, not for chunked",
        ),
        (
            {
                "model.config": {
                    **GEMMA,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    },
                },
                "max_position_embeddings": 512,
            },
            "the model knows 256 positions by RoPE of type linear",
        ),
    ],
)
def test_settings_that_no_model_can_have_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "gpt2", "hidden_size": 32, "n_layer": 2, "num_attention_heads": 4},
        {"model_type": "llama", "rope_theta": 5e4, "rope_scaling": None, "torch_dtype": "float32"},
        {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 500},
        {"model_type": "qwen2", "use_sliding_window": True, "_attn_implementation": "eager"},
    ],
    ids=lambda settings: settings["model_type"],
)
def test_names_that_transformers_maps_to_others_are_settings(settings):
    assert config(**{"model.config": settings}).model_type == settings["model_type"]


@pytest.mark.parametrize("name", sorted({family.model_type for family in FAMILIES.values()}))
def test_every_setting_that_transformers_writes_is_known(name):
    config = AutoConfig.for_model(name)
    names = {"model_type", "transformers_version"}
    refuse_unknown({k: v for k, v in config.to_dict().items() if k not in names}, config)


def frequencies(made: Any, kind: str) -> torch.Tensor:
    """Return the angles a position that one type of layer turns by."""
    rope = AutoModelForCausalLM.from_config(made).model.rotary_emb
    buffers = dict(rope.named_buffers())
    return buffers.get(f"{kind}_inv_freq", buffers.get("inv_freq"))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 1000},
        {"rope": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 1000},
        {
            "rope": {"full_attention": {"rope_type": "linear", "factor": 4.0}},
            "max_position_embeddings": 1000,
        },
    ],
    ids=["by length", "rope", "rope of a type of layer"],
)
def test_layers_that_see_everything_are_scaled_where_types_of_layers_have_ropes(changes):
    own, scaled = (config(**{"model.config": GEMMA, **more}) for more in ({}, changes))
    assert scaled.max_position_embeddings == 1000
    for kind, factor in (("sliding_attention", 1), ("full_attention", 4)):
        wanted = frequencies(own, kind) / factor
        torch.testing.assert_close(frequencies(scaled, kind), wanted)


def test_yarn_starts_from_the_positions_that_the_model_had():
    made = config(rope={"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=1024)
    assert made.max_position_embeddings == 1024
    assert made.rope_parameters["original_max_position_embeddings"] == 256
