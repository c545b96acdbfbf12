"""Gradients of every model family under Seq1F1B against the whole model on one rank, in float32."""

from dataclasses import replace

import pytest

from tests.distributed.families import LATENT, LATENT_SPEC, LLAMA, RMS_NORM, full, selective
from tests.distributed.gradient_checks import check
from tests.distributed.megatron_model import Case
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

_PLAIN = Case(2, 3, 4)
_LLAMA = replace(_PLAIN, config=LLAMA, spec=RMS_NORM)
_QWEN3 = replace(
    _PLAIN, config=LLAMA | {"qk_layernorm": True}, spec=RMS_NORM | {"qk_layernorm": True}
)
_DEEPSEEK = replace(_PLAIN, config=LATENT, spec=LATENT_SPEC)


def with_config(case: Case, **config: object) -> Case:
    return replace(case, config=case.config | config)


FAMILIES = {
    "GPT": replace(_PLAIN, positions="learned_absolute", tied=True),
    "Llama": _LLAMA,
    "Llama, tied": replace(_LLAMA, tied=True),
    "Llama, scaled RoPE": replace(_LLAMA, model={"rope_scaling": True, "rotary_base": 100}),
    "Llama, interpolated RoPE": replace(_LLAMA, model={"seq_len_interpolation_factor": 3.0}),
    "Llama, half of each head rotated": replace(_LLAMA, model={"rotary_percent": 0.5}),
    "Llama, interleaved RoPE": with_config(_LLAMA, rotary_interleaved=True),
    "Llama, some layers without RoPE": with_config(_LLAMA, no_rope_freq=[0, 1, 0, 1]),
    "Llama, YaRN": replace(_LLAMA, positions="yarn"),
    "Qwen3": _QWEN3,
    "Qwen3, tied": replace(_QWEN3, tied=True),
    "Qwen3-MoE": replace(_QWEN3, experts="aux_loss"),
    "Qwen2-MoE, a shared expert": with_config(
        replace(_LLAMA, experts="aux_loss"),
        add_qkv_bias=True,
        moe_shared_expert_intermediate_size=24,
        moe_shared_expert_gate=True,
    ),
    "DeepSeek": _DEEPSEEK,
    "DeepSeek-V3's router": with_config(
        replace(_DEEPSEEK, experts="seq_aux_loss"),
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=2,
        moe_router_group_topk=1,
        moe_router_topk_scaling_factor=2.5,
        moe_router_pre_softmax=True,
    ),
    "DeepSeek, no compressed query": with_config(
        replace(_DEEPSEEK, spec=LATENT_SPEC | {"qk_layernorm": False}),
        q_lora_rank=None,
        qk_layernorm=False,
    ),
    "DeepSeek, YaRN": with_config(
        _DEEPSEEK, rope_type="yarn", rotary_scaling_factor=4.0, original_max_position_embeddings=8
    ),
}


def test_every_family(workers):
    check(workers, 2, list(FAMILIES.values()))


def test_more_tensor_parallel_ranks_than_heads_of_keys(workers):
    multi_query = with_config(_LLAMA, num_query_groups=1)
    cases = [
        replace(multi_query, tensor=2),
        replace(multi_query, tensor=2, sequence_parallel=True, num_splits=3, kind="zb-h1"),
        replace(with_config(_LLAMA, num_query_groups=2), num_stages=1, tensor=4),
    ]
    check(workers, 4, cases)


@pytest.mark.parametrize("name", ["Llama, YaRN", "DeepSeek, YaRN"])
def test_split_backwards_and_chunks(workers, name):
    family = FAMILIES[name]
    kinds = ({"kind": "zb-h1"}, {"kind": "greedy", "num_chunks": 2}, {"num_chunks": 2})
    check(workers, 2, [replace(family, num_micro_batches=4, **kind) for kind in kinds])


def test_latent_attention_among_experts_and_documents(workers):
    others = (
        {"experts": "seq_aux_loss"},
        {"documents": "position_ids"},
        {"documents": "tokens", "num_stages": 2, "kind": "zb-h1"},
        {"experts": "aux_loss", "documents": "cu_seqlens", "num_chunks": 2},
    )
    check(workers, 2, [replace(_DEEPSEEK, **other) for other in others])


RECOMPUTED = {
    "every layer": (_LLAMA, full("uniform", 1)),
    "two layers at a time": (_QWEN3, full("uniform", 2)),
    "one layer of a chunk": (_LLAMA, full("block", 1)),
    "latent attention's layers": (_DEEPSEEK, full("uniform", 1)),
    "attention": (_LLAMA, selective("core_attn")),
    "norms": (_QWEN3, selective("layernorm")),
    "MLPs": (_LLAMA, selective("mlp")),
    "latent attention": (_DEEPSEEK, selective("core_attn")),
    "latent up-projections": (_DEEPSEEK, selective("mla_up_proj")),
    "several": (_DEEPSEEK, selective("core_attn", "layernorm", "mlp")),
    "all but attention": (_DEEPSEEK, selective("mla_up_proj", "layernorm", "mlp")),
}
SCHEDULES = {
    "1f1b": {},
    "interleaved": {"num_chunks": 2, "num_micro_batches": 4},
    "zb-h1": {"kind": "zb-h1"},
    "greedy": {"kind": "greedy"},
    "greedy interleaved": {"kind": "greedy", "num_chunks": 2, "num_micro_batches": 4},
}


@pytest.mark.parametrize("schedule", mostly_long(SCHEDULES, default=["zb-h1"]))
def test_recomputation(workers, schedule):
    cases = [
        replace(with_config(family, **config), **SCHEDULES[schedule])
        for family, config in RECOMPUTED.values()
    ]
    check(workers, 2, cases)


LOSS_RECOMPUTED = {
    "GPT, tied": replace(_PLAIN, positions="learned_absolute", tied=True),
    "Llama": _LLAMA,
    "every layer too": with_config(_LLAMA, **full("uniform", 1)),
    "experts": replace(_LLAMA, experts="aux_loss"),
    "normalised by all tokens": replace(_LLAMA, per_token=True),
    "documents": replace(_LLAMA, documents="position_ids"),
}


@pytest.mark.parametrize("schedule", mostly_long(SCHEDULES, default=["interleaved"]))
def test_recomputed_losses(workers, schedule):
    cases = [
        replace(case, recompute_loss=True, **SCHEDULES[schedule])
        for case in LOSS_RECOMPUTED.values()
    ]
    check(workers, 2, cases)


def test_recomputed_losses_of_vocabulary_shards(workers):
    case = replace(_LLAMA, tensor=2, sequence_parallel=True, recompute_loss=True)
    check(workers, 4, [case, replace(case, tied=True, kind="zb-h1")])


AHEAD = {
    "Llama": with_config(_LLAMA, mtp_num_layers=1),
    "two tokens ahead": with_config(_QWEN3, mtp_num_layers=2),
    "tied": with_config(replace(_LLAMA, tied=True), mtp_num_layers=1),
    "DeepSeek": with_config(_DEEPSEEK, mtp_num_layers=2),
    "normalised by all tokens": with_config(replace(_LLAMA, per_token=True), mtp_num_layers=2),
    "mean loss": with_config(replace(_LLAMA, loss="mean"), mtp_num_layers=1),
    "heads apart": with_config(_LLAMA, mtp_num_layers=1, mtp_detach_heads=True),
    "recomputed": with_config(_DEEPSEEK, mtp_num_layers=2, **full("uniform", 1)),
    "attention recomputed": with_config(_LLAMA, mtp_num_layers=1, **selective("core_attn")),
    "short parts": with_config(replace(_LLAMA, length=12, num_splits=8), mtp_num_layers=3),
    "one stage": with_config(_LLAMA, mtp_num_layers=2),
}


@pytest.mark.long
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_multi_token_prediction(workers, schedule):
    check(workers, 2, [replace(case, **SCHEDULES[schedule]) for case in AHEAD.values()])
