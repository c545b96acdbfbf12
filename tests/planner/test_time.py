"""Kernel curves, action costs, and the published throughput."""

import itertools

import pytest

from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.gpu import gpu
from seq1f1b.planner.presets import model_options
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime
from seq1f1b.planner.time import Kernels, StepTime, action_costs, quick_seconds, step_time
from seq1f1b.schedule import Kind
from tests.planner.published import SCHEDULES, THROUGHPUT, options_of

Cell = tuple[int, int]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels(gpu("a100-80g"))


@pytest.fixture(scope="module")
def predicted(kernels) -> dict[Cell, dict[str, float]]:
    profile = runtime("megatron-2023")
    return {
        (length, number): {
            name: step_time(
                resolve(options_of("7B", length, number), schedule=ScheduleName(name)),
                kernels,
                profile,
            ).tokens_per_second
            for name in SCHEDULES
        }
        for length, number in THROUGHPUT
    }


def test_published_ratios_to_1f1b(predicted):
    errors = {}
    for cell, row in THROUGHPUT.items():
        for name, value in zip(SCHEDULES[1:3], row[1:3], strict=True):
            if value is not None and row[0] is not None:
                ratio = predicted[cell][name] / predicted[cell]["1f1b"]
                errors[cell, name] = ratio / (value / row[0]) - 1
    assert len(errors) == 7
    assert max(map(abs, errors.values())) <= 0.08


def test_the_constant_of_the_interleaved_loop_holds_at_another_length(predicted):
    for number in (8, 16):
        plain, *_, both = THROUGHPUT[65536, number]
        assert plain is not None
        assert both is not None
        rates = predicted[65536, number]
        assert abs(rates["seq1f1b-interleaved"] / rates["1f1b"] / (both / plain) - 1) <= 0.08


def test_schedules_that_differ_are_in_the_published_order(predicted):
    for cell, row in THROUGHPUT.items():
        known = [(name, value) for name, value in zip(SCHEDULES, row, strict=True) if value]
        for (one, slow), (other, fast) in itertools.permutations(known, 2):
            if fast > 1.06 * slow:
                assert predicted[cell][other] > predicted[cell][one], (cell, one, other)


def test_measured_points_are_returned_as_they_are(kernels):
    seconds = kernels.matrix_product(4096, 4096, 4096)
    assert 2 * 4096**3 / seconds == pytest.approx(250.4e12, rel=1e-3)
    seconds = kernels.attention(16384, 0, 32, 32, 128, False)
    assert 4 * 32 * 128 * 16384 * 16385 / 2 / seconds == pytest.approx(175.2e12, rel=1e-3)
    assert kernels.collective("all_reduce", 1 << 25, 8) == pytest.approx(0.367e-3, rel=1e-3)


def test_rows_fill_whole_tiles(kernels):
    times = [kernels.matrix_product(rows, 4096, 4096) for rows in (2304, 2305, 2432)]
    assert times[0] < times[1] == times[2]


def test_a_prefix_makes_attention_longer_and_fewer_heads_slower(kernels):
    def rate(own, before, heads):
        operations = 4 * heads * 128 * (own * before + own * (own + 1) / 2)
        return operations / kernels.attention(own, before, heads, heads, 128, False)

    assert kernels.attention(4096, 8192, 8, 8, 128, False) > 3.5 * kernels.attention(
        4096, 0, 8, 8, 128, False
    )
    assert rate(4096, 0, 4) < rate(4096, 0, 8) < rate(4096, 0, 32)
    assert rate(2048, 0, 4) < rate(2048, 14336, 4) < rate(16384, 0, 4)


def test_collectives_across_nodes_go_over_the_network(kernels):
    inside = kernels.collective("all_gather", 1 << 28, 8)
    assert kernels.collective("all_gather", 1 << 28, 16) > 5 * inside
    assert kernels.collective("all_gather", 1 << 28, 8, 8) > 5 * inside
    assert kernels.collective("all_gather", 1 << 28, 1) == 0


def test_measured_prefixes_come_before_the_rule():
    from seq1f1b.planner.time.kernels import _AttentionRates

    points = [(1024, 0, 4, 4, 64, 10.0), (1024, 3072, 4, 4, 64, 30.0)]
    rates = _AttentionRates(points, "geometric")
    assert rates.rate(1024, 0, 4, 4) == 10.0
    assert rates.rate(1024, 3072, 4, 4) == 30.0
    assert 10.0 < rates.rate(1024, 1024, 4, 4) < 30.0


def costs_of(kernels, options, stage=0):
    setting = resolve(options)
    return setting, action_costs(setting, kernels, runtime("current")).stages[stage]


def test_the_head_makes_the_last_stage_longer(kernels):
    options = model_options("llama-3-8b") | {
        "seq_length": 8192,
        "global_batch_size": 8,
        "pipeline_model_parallel_size": 8,
    }
    step = step_time(resolve(options), kernels, runtime("current"))
    assert step.stage_seconds[-1] > 1.4 * step.stage_seconds[1]
    layout = "Et*4|(t*4|)*4t*5|t*5|t*2L"
    better = step_time(
        resolve(options | {"pipeline_model_parallel_layout": layout}), kernels, runtime("current")
    )
    assert better.seconds < step.seconds


def test_uneven_layers_cost_by_their_number(kernels):
    options = model_options("gpt-7b") | {
        "seq_length": 8192,
        "global_batch_size": 8,
        "pipeline_model_parallel_size": 4,
        "decoder_first_pipeline_num_layers": 5,
    }
    _, first = costs_of(kernels, options)
    _, second = costs_of(kernels, options, 1)
    assert first[Kind.F, 0, 0] / second[Kind.F, 0, 0] == pytest.approx(5 / 9, rel=0.05)


def test_recomputation_lengthens_backwards_alone(kernels):
    options = model_options("gpt-7b") | {
        "seq_length": 8192,
        "global_batch_size": 8,
        "pipeline_model_parallel_size": 4,
    }
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    mlp = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
    cut = options | {"seq1f1b_splits": 2, "seq1f1b_balance_method": "average"}
    _, nothing = costs_of(kernels, options, 1)
    _, some = costs_of(kernels, options | mlp, 1)
    _, everything = costs_of(kernels, options | full, 1)
    forward, backward = (Kind.F, 0, 0), (Kind.B, 0, 0)
    assert nothing[forward] == some[forward] == everything[forward]
    assert nothing[backward] < some[backward] < everything[backward]
    assert everything[backward] - nothing[backward] == pytest.approx(nothing[forward], rel=0.02)
    # The last stage's forward is longer than the others' by the output layer and the loss.
    _, middle = costs_of(kernels, cut, 1)
    _, kept = costs_of(kernels, cut, 3)
    _, anew = costs_of(kernels, cut | {"seq1f1b_recompute_loss": True}, 3)
    head = kept[forward] - middle[forward]
    assert anew[forward] == kept[forward]
    assert anew[backward] - kept[backward] == pytest.approx(head, rel=0.02)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "qwen3-4b", "gpt-3-175b"])
def test_every_family_has_times(kernels, name):
    options = model_options(name) | {
        "num_layers": 4,
        "moe_layer_freq": 1,
        "seq_length": 8192,
        "global_batch_size": 64,
        "pipeline_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_distributed_optimizer": True,
    }
    if "num_experts" in options:
        options["expert_model_parallel_size"] = 4
        options["expert_tensor_parallel_size"] = 1
    for splits in (1, 4):
        setting = resolve(options | {"seq1f1b_splits": splits}, num_gpus=16)
        step = step_time(setting, kernels, runtime("current"))
        assert 0.05 < step.mfu(312) < 0.8
        quick = quick_seconds(setting, kernels, runtime("current"))
        assert quick == pytest.approx(step.seconds, rel=0.15)


def test_overlap_hides_reductions(kernels):
    def seconds(**changes: object) -> StepTime:
        options = model_options("gpt-7b") | {"seq_length": 8192, "global_batch_size": 64}
        options |= {"use_distributed_optimizer": True} | changes
        return step_time(resolve(options, num_gpus=16), kernels, runtime("current"))

    shown, hidden = seconds(), seconds(overlap_grad_reduce=True, overlap_param_gather=True)
    assert 0 < hidden.reduction < shown.reduction
