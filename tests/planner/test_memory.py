"""The allocator's rules, and what every kind of layer keeps."""

from dataclasses import replace

import pytest

from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.memory import GIB, MemoryTrace, estimate_stages, trace_memory
from seq1f1b.planner.memory.allocator import MIB, Allocator
from seq1f1b.planner.memory.parameters import stage_parameters, static_sizes
from seq1f1b.planner.presets import model_options, presets
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime

SMALL = {
    "num_layers": 8,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "seq_length": 8192,
    "global_batch_size": 8,
    "pipeline_model_parallel_size": 4,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bf16": True,
}


def traced(profile: str = "current", schedule: str | None = None, **changes: object) -> MemoryTrace:
    name = ScheduleName(schedule) if schedule else None
    return trace_memory(resolve(SMALL | changes, schedule=name), runtime(profile))


def kept(trace: MemoryTrace, stage: int = 0) -> float:
    return trace.stages[stage].activations / GIB


def test_requests_are_rounded_up_and_share_segments():
    allocator = Allocator()
    blocks = [allocator.allocate(size) for size in (1, 513, 3 * MIB, 18 * MIB + 1)]
    assert [block[0] for block in blocks] == [512, 1024, 3 * MIB, 18 * MIB + 512]
    assert allocator.reserved == (2 + 20 + 20) * MIB
    assert allocator.allocated == 512 + 1024 + 3 * MIB + 18 * MIB + 512


def test_the_smallest_free_block_is_taken_and_neighbours_merge():
    allocator = Allocator()
    large, small = allocator.allocate(40 * MIB), allocator.allocate(30 * MIB)
    allocator.free(large)
    allocator.free(small)
    first = allocator.allocate(25 * MIB)
    assert first[1] == small[1]
    assert allocator.reserved == 70 * MIB
    parts = [allocator.allocate(20 * MIB), allocator.allocate(20 * MIB)]
    assert {part[1] for part in parts} == {large[1]}
    for part in parts:
        allocator.free(part)
    assert allocator.allocate(40 * MIB)[1] == large[1]
    assert allocator.reserved == 70 * MIB


def test_a_rest_too_small_to_be_used_stays_with_its_block():
    allocator = Allocator()
    whole = allocator.allocate(30 * MIB)
    allocator.free(whole)
    assert allocator.allocate(30 * MIB - MIB // 2)[0] == 30 * MIB


def test_every_tensor_is_freed_at_the_end_of_a_step():
    first = trace_memory(resolve(SMALL | {"global_batch_size": 8}), runtime("current"))
    more = trace_memory(resolve(SMALL | {"global_batch_size": 16}), runtime("current"))
    assert first.stages[0].activations == more.stages[0].activations


@pytest.mark.parametrize("name", [name for name in ScheduleName if name != "greedy"])
def test_every_schedule_is_traced(name):
    trace = traced(schedule=str(name))
    for stage in trace.stages:
        assert stage.static < stage.allocated <= stage.reserved
        assert stage.activations < stage.allocated


def test_a_layer_keeps_34_bytes_a_token_and_hidden_unit():
    # arXiv 2205.05198, section 4.1, less two dropout masks, plus views of the QKV projection and
    # the kernel's log-sum-exp
    one = traced(num_layers=4, vocab_size=128, num_attention_heads=8)
    per_token = one.stages[1].activations / 8192 / 3 / 1024
    assert per_token == pytest.approx(34 - 2 + 4, rel=0.01)


def test_sub_sequences_keep_fewer_micro_batches():
    plain, cut = traced(), traced(seq1f1b_splits=4)
    assert kept(cut) < 0.6 * kept(plain)
    assert kept(plain) == pytest.approx(2 * kept(plain, 2), rel=0.01)


def test_recomputation_keeps_less_and_in_this_order():
    selective = {"recompute_granularity": "selective"}
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    nothing = kept(traced())
    core = kept(traced(**selective))
    norms = kept(traced(**selective, recompute_modules=("layernorm",)))
    mlp = kept(traced(**selective, recompute_modules=("mlp",)))
    both = kept(traced(**selective, recompute_modules=("mlp", "layernorm")))
    whole = kept(traced(**full))
    deep = {"num_layers": 64}
    groups = kept(traced(**(full | deep | {"recompute_num_layers": 2})))
    some = kept(traced(**(full | {"recompute_method": "block"})))
    assert groups < kept(traced(**(full | deep)))
    assert whole < both < mlp < norms < core < nothing
    assert whole < some < nothing


def test_a_recomputed_loss_keeps_the_softmax_of_one_sub_sequence():
    options = {"seq1f1b_splits": 4, "vocab_size": 131072, "seq1f1b_balance_method": "average"}
    held, anew = traced(**options), traced(**options, seq1f1b_recompute_loss=True)
    softmax = 4 * 131072 * SMALL["seq_length"] / GIB
    assert kept(held, 3) - kept(anew, 3) == pytest.approx(3 / 4 * softmax, rel=0.1)
    assert kept(held) == kept(anew)


def test_gqa_shrinks_the_carry():
    whole = traced(seq1f1b_splits=4)
    grouped = traced(seq1f1b_splits=4, group_query_attention=True, num_query_groups=2)
    assert kept(grouped) < kept(whole)


def test_tensor_and_context_parallelism_share_activations():
    alone = kept(traced())
    tensor = kept(traced(tensor_model_parallel_size=2, sequence_parallel=True))
    unsharded = kept(traced(tensor_model_parallel_size=2))
    context = kept(traced(context_parallel_size=2))
    assert tensor == pytest.approx(alone / 2, rel=0.01)
    assert tensor < unsharded < alone
    assert context == pytest.approx(alone / 2, rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("name", presets())
def test_every_model_is_traced_with_and_without_sub_sequences(name):
    options = model_options(name) | {
        "seq_length": 8192,
        "global_batch_size": 4,
        "tensor_model_parallel_size": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    options |= {"num_layers": 4, "moe_layer_freq": 1, "pipeline_model_parallel_size": 2}
    for splits in (1, 2):
        trace = trace_memory(resolve(options | {"seq1f1b_splits": splits}), runtime("current"))
        assert trace.peak_gib > 0
        estimate = estimate_stages(
            resolve(options | {"seq1f1b_splits": splits}), runtime("current")
        )
        assert max(estimate) == pytest.approx(trace.peak_gib, rel=0.35)


@pytest.mark.parametrize("balance", ["average", "uniform_comp"])
@pytest.mark.parametrize("anew", [False, True])
def test_the_closed_form_counts_logits_of_unequal_lengths(balance, anew):
    options = model_options("llama-3-8b") | {
        "seq_length": 65536,
        "global_batch_size": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 4,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
        "seq1f1b_splits": 8,
        "seq1f1b_balance_method": balance,
        "seq1f1b_recompute_loss": anew,
    }
    setting = resolve(options)
    last = trace_memory(setting, runtime("current")).stages[-1]
    estimate = estimate_stages(setting, runtime("current"))[-1]
    assert estimate == pytest.approx(last.reserved / GIB, rel=0.15)


@pytest.mark.parametrize(
    "name, billions",
    [
        ("llama-2-7b", 6.738),
        ("llama-3-8b", 8.030),
        ("llama-3-70b", 70.55),
        ("llama-3.1-405b", 405.85),
        ("mixtral-8x7b", 46.70),
        ("qwen3-4b", 4.022),
        ("qwen3-30b-a3b", 30.53),
        ("qwen2.5-7b", 7.616),
        ("deepseek-v2-lite", 15.71),
    ],
)
def test_parameters_are_the_published_number(name, billions):
    held = stage_parameters(resolve(model_options(name) | {"seq_length": 4096}), 0)
    assert (held.dense + held.experts) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_bytes_of_a_parameter():
    def per_parameter(**changes: object) -> float:
        setting = resolve(SMALL | {"pipeline_model_parallel_size": 1} | changes, num_gpus=4)
        held = stage_parameters(setting, 0)
        return sum(static_sizes(setting, 0)) / held.dense

    assert per_parameter() == pytest.approx(18)
    assert per_parameter(use_distributed_optimizer=True) == pytest.approx(6 + 12 / 4)
    assert per_parameter(bf16=False) == pytest.approx(16)
    assert per_parameter(grad_reduce_in_bf16=True) == pytest.approx(16)
    assert per_parameter(optimizer="sgd") == pytest.approx(14)
    assert per_parameter(
        use_precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"
    ) == pytest.approx(14)


def test_experts_are_shared_by_expert_parallel_ranks():
    options = model_options("mixtral-8x7b") | {"seq_length": 4096}
    whole = stage_parameters(resolve(options), 0)
    shared = resolve(options | {"expert_model_parallel_size": 8})
    assert shared.data == 8
    assert stage_parameters(shared, 0).experts == whole.experts / 8


def test_a_host_reserves_what_is_allocated():
    stage = traced("cpu").stages[0]
    assert stage.reserved == stage.allocated


def test_longer_steps_are_cut_short_without_changing_the_peak():
    options = SMALL | {"seq1f1b_splits": 4}
    full = trace_memory(resolve(options | {"global_batch_size": 64}), runtime("current"))
    longer = trace_memory(resolve(options | {"global_batch_size": 4096}), runtime("current"))
    assert longer.peak_gib == pytest.approx(full.peak_gib, rel=0.02)


def test_given_cuts_are_followed():
    setting = resolve(SMALL | {"seq1f1b_splits": 2})
    profile = runtime("current")
    lopsided = trace_memory(setting.with_cuts((7168, 1024)), profile)
    assert lopsided.peak_gib != trace_memory(replace(setting, cuts=None), profile).peak_gib


@pytest.mark.parametrize("layout", ["E|tttt|tttt|L", "Ettt|tttt|t|L", "E|tt|tt|tt|tt|||L"])
def test_chunks_without_layers_are_traced(layout):
    for splits in (1, 2):
        trace = traced(pipeline_model_parallel_layout=layout, seq1f1b_splits=splits)
        assert trace.peak_gib > 0
