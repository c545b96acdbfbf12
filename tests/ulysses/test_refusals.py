"""Families that cannot be exact are refused at dispatch, by a sentence that names the class."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from seq1f1b.ulysses import UnsupportedModelError, dispatch_modules, init_sequence_parallel
from seq1f1b.ulysses.shrink import shrink

REFUSED = {
    "bamba": "BambaMixer mixes tokens",
    "bert": "a mask that is not causal",
    "bloom": "BloomAttention mixes tokens",
    "codegen": "CodeGenAttention mixes tokens",
    "deepseek_v32": "DeepseekV32Attention brings a mask",
    "falcon_h1": "FalconH1Mixer mixes tokens",
    "falcon_mamba": "FalconMambaMixer mixes tokens",
    "gptj": "GPTJAttention mixes tokens",
    "jamba": "JambaMambaMixer mixes tokens",
    "kimi_linear": "KimiLinearDeltaAttention mixes tokens",
    "mamba": "MambaMixer mixes tokens",
    "minimax": "MiniMaxLightningAttention mixes tokens",
    "mpt": "MptAttention mixes tokens",
    "nemotron_h": "NemotronHMamba2Mixer mixes tokens",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock mixes tokens",
    "xglm": "XGLMAttention mixes tokens",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_family_is_refused_by_name(model_type):
    init_sequence_parallel(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model(model_type)))
    with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]) as refusal:
        dispatch_modules(model)
    assert str(refusal.value).startswith(type(model).__name__)


def test_alibi_of_falcon_is_refused():
    init_sequence_parallel(1)
    config = shrink(AutoConfig.for_model("falcon"))
    config.alibi = True
    with pytest.raises(UnsupportedModelError, match="FalconAttention adds a bias"):
        dispatch_modules(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def test_an_encoder_decoder_model_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    init_sequence_parallel(1)
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        dispatch_modules(T5ForConditionalGeneration(config))


def test_weights_on_the_meta_device_are_enough_where_a_small_model_can_be_built():
    init_sequence_parallel(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model("llama")))
    assert dispatch_modules(model) is model


def test_weights_on_the_meta_device_cannot_be_probed():
    init_sequence_parallel(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink(AutoConfig.for_model("llama")))
        model.model.layers[0].mlp = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        dispatch_modules(model)
