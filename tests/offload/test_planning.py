"""The model of a step whose chunks visit the GPUs: times and bytes, by other routes."""

import math
from dataclasses import replace

import pytest

from megatron.adaptor.command_line.settings import Settings
from seq1f1b.cli.source import SettingCosts
from seq1f1b.offload.planning.case import Case, make_case
from seq1f1b.offload.planning.costs import action_costs, moved, parameters, stage_link
from seq1f1b.offload.planning.machine import GB, Machine
from seq1f1b.offload.planning.memory import (
    estimated_bytes,
    slot_parameters,
    slot_sizes,
    traced_bytes,
)
from seq1f1b.offload.planning.search import best_offloaded
from seq1f1b.offload.planning.shape import Shape, arrange, batches, layouts
from seq1f1b.offload.planning.simulation import Adam, simulate_visits
from seq1f1b.offload.planning.thresholds import bubble, thresholds
from seq1f1b.offload.planning.ways import offloaded, resident, time_visits, zero_offload
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.gpu import gpu
from seq1f1b.planner.presets import model_options
from seq1f1b.planner.setting import Setting
from seq1f1b.schedule import Kind, interleaved, lower, num_loads, visiting
from seq1f1b.sequence import TokenCost
from seq1f1b.simulate import simulate

SMALL = {
    "num_layers": 16,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "swiglu": True,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "vocab_size": 8192,
    "hidden_dropout": 0.0,
}


def machine(num_gpus: int = 4, card: str = "l20", **rates: float) -> Machine:
    return Machine.of(gpu(card), num_gpus, **rates)


def case(where: Machine, length: int = 2048, rows: int = 8, **values: object) -> Case:
    step = {"seq_length": length, "global_batch_size": rows}
    return make_case(SMALL | step | values, where)


def setting(shape: Shape, where: Machine, rows: int = 8) -> Setting:
    return arrange(case(where, rows=rows).base, where.num_gpus, shape, rows)


@pytest.mark.parametrize("k, v", [(1, 2), (2, 2), (2, 3), (2, 4), (3, 4), (4, 4)])
@pytest.mark.parametrize("turns", [1, 2])
def test_loads_are_those_of_the_schedule_and_of_the_formula(v, k, turns):
    where = machine(2)
    shape = Shape(v, k, turns, 1, 8)
    layout = next(layouts(case(where).base, 2, v))
    one = arrange(case(where).base, 2, shape, 8, layout)
    schedule = shape.schedule(2)
    counted = tuple(sum(a.kind.is_load for a in actions) for actions in schedule.stages)
    visits = time_visits(one, shape, where, Adam.SERIAL)
    assert visits.loads == counted
    if turns == 1:
        assert set(counted) == {2 * v - k}
    elif k > 1:
        expected = (2 * v - k) + 2 * (turns - 1) * (v - k)
        assert expected == num_loads(v, k, turns)
        assert all(0 <= loads - expected <= 2 for loads in counted)


@pytest.mark.parametrize("turns", [1, 2])
def test_the_schedule_is_the_one_that_training_runs(turns):
    shape = Shape(4, 2, turns, 2, 8)
    settings = Settings(
        num_splits=2,
        balance_method="average",
        sequence_length=64,
        length_multiple=1,
        cost=TokenCost(1.0, 0.0),
        turn=shape.turn(4) if turns > 1 else None,
        offload_chunks=2,
        offload_prefetch=True,
    )
    trained = settings.schedule(4, 4, 8, trains=True)
    assert trained.stages == shape.schedule(4).stages
    assert trained.slots == shape.schedule(4).slots


def test_what_crosses_a_link_is_weights_once_a_load_and_gradients_once_a_chunk():
    where = replace(machine(2), per_root=1)
    shape = Shape(4, 2, 1, 1, 8)
    one = setting(shape, where)
    each = [sum(chunks) for chunks in parameters(one)]
    first = [chunks[0] + chunks[1] for chunks in parameters(one)]
    # forward all chunks, backward all but the two of the turning point: the last
    last = [chunks[2] + chunks[3] for chunks in parameters(one)]
    loaded = [2 * (2 * total - kept) for total, kept in zip(each, last, strict=True)]
    assert first != last
    visits = time_visits(one, shape, where, Adam.SERIAL)
    assert visits.uplink_bytes == pytest.approx(max(loaded))


@pytest.mark.parametrize(
    "shape", [Shape(2, 2, 1, 1, 8), Shape(4, 2, 1, 2, 4), Shape(2, 1, 2, 1, 8)]
)
def test_without_time_for_copies_and_adam_it_is_the_bare_schedule(shape):
    where = replace(machine(2), pcie=math.inf, uplink=math.inf, host=math.inf)
    one = setting(shape, where)
    bare = simulate(shape.bare(2), action_costs(one, where.flops), stage_link(one, where)).step_time
    for adam in (Adam.SERIAL, Adam.JUST_IN_TIME):
        assert time_visits(one, shape, where, adam).seconds == pytest.approx(bare)


def test_serial_adam_is_added_and_overlapped_adam_hides():
    where = replace(machine(), pcie=math.inf, uplink=math.inf, host=60 * GB)
    shape = Shape(4, 2, 1, 1, 8)
    one = setting(shape, where)
    adam = sum(map(sum, moved(one, where).adam))
    bare = time_visits(one, shape, replace(where, host=math.inf), Adam.SERIAL).seconds
    serial, just_in_time, on_arrival = (
        time_visits(one, shape, where, each).seconds for each in Adam
    )
    assert serial == pytest.approx(bare + adam)
    assert bare < on_arrival < just_in_time < serial
    first = moved(one, where).adam[0][0]
    assert on_arrival >= bare + first  # whose gradients come last and whose weights are first
    fast = replace(where, host=3000 * GB)
    for each in (Adam.JUST_IN_TIME, Adam.ON_ARRIVAL):
        seen = time_visits(one, shape, fast, each).seconds - bare
        assert seen == pytest.approx(moved(one, fast).adam[0][0], rel=1e-6)


def test_a_step_is_no_shorter_than_what_it_consists_of():
    for v, k, turns, adam in (
        (2, 2, 1, Adam.SERIAL),
        (4, 2, 1, Adam.JUST_IN_TIME),
        (4, 1, 1, Adam.ON_ARRIVAL),
        (2, 2, 2, Adam.ON_ARRIVAL),
    ):
        where = machine()
        shape = Shape(v, k, turns, 1, 8)
        one = setting(shape, where)
        way = offloaded(one, shape, where, case(where).runtime, adam)
        parts = (way.parts.compute, way.parts.bubble, way.parts.adam, way.parts.pcie)
        assert min(parts) >= -1e-9
        assert sum(parts) == pytest.approx(way.seconds)
        assert way.bound.seconds <= way.seconds


def test_sharing_a_root_slows_loads_and_crossing_the_mapping_can_help():
    shape = Shape(4, 2, 1, 1, 2)
    slow = replace(machine(), pcie=2 * GB, uplink=2 * GB)
    one = setting(shape, slow)
    shared, own = (
        time_visits(one, shape, replace(slow, per_root=number), Adam.SERIAL).seconds
        for number in (4, 1)
    )
    assert shared > 1.3 * own
    assert [replace(slow, crossed=True).root(stage) for stage in range(4)] == [0, 1, 0, 1]
    assert [slow.root(stage) for stage in range(4)] == [0, 0, 1, 1]


def test_prefetch_hides_loads():
    shape, where = Shape(4, 2, 1, 1, 8), replace(machine(), pcie=5 * GB, uplink=5 * GB)
    one = setting(shape, where)
    early, late = (
        time_visits(one, shape, where, Adam.SERIAL, prefetch=prefetch).seconds
        for prefetch in (True, False)
    )
    assert early < late


def test_actions_cost_their_operations():
    where = machine()
    one = setting(Shape(2, 2, 1, 1, 8), where)
    costs = action_costs(one, where.flops)
    h, f, t = 1024, one.model.ffn, 2048
    layer = 2 * t * (4 * h * h + 3 * h * f) + 2 * 2 * h * t * (t + 1) / 2
    head = 2 * t * h * 8192
    forward = [2 * layer / where.flops, (2 * layer + head) / where.flops]
    assert costs.stages[0][Kind.F, 0, 0] == pytest.approx(forward[0])
    assert costs.stages[0][Kind.B, 0, 0] == pytest.approx(3 * forward[0])
    assert costs.stages[3][Kind.F, 1, 0] == pytest.approx(forward[1])
    assert costs.stages[3][Kind.B, 1, 0] == pytest.approx((6 * layer + 2 * head) / where.flops)
    kept = make_case(
        SMALL | {"seq_length": t, "global_batch_size": 8, "recompute_granularity": "selective"},
        where,
    )
    selective = action_costs(arrange(kept.base, 4, Shape(2, 2, 1, 1, 8), 8), where.flops)
    attention = 2 * 2 * 2 * h * t * (t + 1) / 2 / where.flops
    assert selective.stages[0][Kind.B, 0, 0] == pytest.approx(2 * forward[0] + attention)


def test_slots_are_what_more_resident_chunks_cost():
    where = machine()
    one, held = setting(Shape(4, 1, 1, 1, 8), where), []
    for slots in (1, 2, 3):
        schedule = Shape(4, slots, 1, 1, 8).schedule(4)
        held.append(traced_bytes(one, case(where).runtime, schedule, num_slots=slots))
    largest = max(max(chunks) for chunks in parameters(one))
    assert held[2] - held[1] == pytest.approx(held[1] - held[0], rel=0.05)
    assert held[1] - held[0] == pytest.approx(4 * largest, rel=0.1)


@pytest.mark.parametrize(
    "shape", [Shape(2, 2, 1, 1, 8), Shape(4, 2, 1, 4, 4), Shape(2, 1, 2, 1, 8)]
)
def test_the_estimate_of_memory_is_near_the_trace(shape):
    where, one = machine(), setting(shape, machine())
    profile = case(where).runtime
    traced = traced_bytes(one, profile, shape.schedule(4), num_slots=shape.num_slots)
    assert estimated_bytes(one, profile, shape) == pytest.approx(traced, rel=0.15)


def test_a_recomputed_loss_keeps_the_softmax_of_one_sub_sequence():
    where, shape = machine(), Shape(2, 2, 1, 8, 1)
    step = {"seq_length": 32768, "global_batch_size": 1, "vocab_size": 131072}
    step["seq1f1b_balance_method"] = "average"
    held, costs = [], []
    for anew in (False, True):
        small = SMALL | step | {"hidden_size": 512, "seq1f1b_recompute_loss": anew}
        asked = make_case(small, where)
        one = arrange(asked.base, 4, shape, 1)
        held.append(traced_bytes(one, asked.runtime, shape.schedule(4), num_slots=2))
        costs.append(action_costs(one, 1.0).stages[3][Kind.B, 1, 0])
        first = one.lengths[0]
    assert held[0] - held[1] == pytest.approx(7 / 8 * 4 * 131072 * 32768, rel=0.1)
    assert costs[1] - costs[0] == pytest.approx(2 * 512 * 131072 * first)


def test_a_slot_has_room_for_the_largest_chunk_and_for_experts_that_are_dealt():
    where, h, width = machine(2), 1024, 3 * 1024
    experts = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 512}
    mixed = case(where, moe_layer_freq="[0]*8+[1]*8", **experts).base
    one = arrange(mixed, 2, Shape(2, 1, 1, 1, 8), 8)
    both = 4 * (4 * h * h + 2 * h)
    table, dense, router, dealt = 8192 * h, 4 * width * 2688, 4 * 4 * h, 4 * 4 * width * 512
    # embedding and layers without experts, or the last ones, with experts and the output layer
    assert slot_parameters(one, 0) == both + max(table + dense, router + dealt)
    assert slot_parameters(one, 1) == both + max(dense, router + dealt + table + h)
    # a half of the experts on another rank: Megatron keeps these in a buffer apart
    apart = replace(one, experts=2)
    assert slot_parameters(apart, 0) == both + table + dense + dealt / 2
    assert slot_parameters(apart, 1) == both + max(dense, router + table + h) + dealt / 2


def test_pictures_count_the_same_slots():
    values = SMALL | {
        "seq_length": 1024,
        "global_batch_size": 8,
        "num_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 512,
        "moe_layer_freq": "[0]*8+[1]*8",
        "expert_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 4,
    }
    costs = SettingCosts(values, 4, None, 100.0, 2.0, None, None)
    schedule = visiting(lower(interleaved(2, 4, 4, 2)), 2)
    setting = costs.setting(schedule)
    for stage, chunks in enumerate(costs.memory(schedule)):
        room = slot_sizes(setting, stage, 1)
        assert [[chunk.weights, chunk.gradients] for chunk in chunks] == [room] * 4
    assert slot_parameters(setting, 0) > max(parameters(setting)[0])


def test_zero_offload_by_hand():
    where = machine()
    way = zero_offload(case(where, length=128, rows=64).base, 64, where, case(where).runtime)
    h, f, total = 1024, 2688, 16 * (4 * 1024**2 + 3 * 1024 * 2688 + 2 * 1024)
    total += 2 * 8192 * h + h
    assert way.setting.model.ffn == f
    tokens = 16 * 128
    layer = tokens * (2 * (4 * h * h + 3 * h * f)) + 16 * 4 * h * 128 * 129 / 2
    forward = (16 * layer + 2 * tokens * h * 8192) / where.flops
    backward = (3 * 16 * layer + 4 * tokens * h * 8192) / where.flops
    gathered = 2 * total * 3 / 4 / (10 * GB)
    adam, copies = 30 * total / (300 * GB), 4 * total / 4 / (12.5 * GB)
    scattered = max(backward, gathered)
    seconds = forward + scattered + gathered + adam + copies
    assert way.shape.num_micro_batches == 1
    assert way.seconds == pytest.approx(seconds, rel=1e-6)
    assert way.host_bytes == pytest.approx(20 * total)


def test_thresholds_of_two_machines():
    for card, loads, adam in (("l20", 2868, 3585), ("rtx-4090", 3965, 17090)):
        where = machine(card=card)
        found = thresholds(case(where).base, where)
        assert found.loads == pytest.approx(loads, rel=1e-3)
        assert found.loads_together == pytest.approx(2 * loads, rel=1e-3)
        assert found.adam == pytest.approx(adam, rel=1e-3)
    assert bubble(4, 2, 8, 4) == 3 / 64
    where = machine()
    step = {"seq_length": 128, "global_batch_size": 8}
    mixture = make_case(model_options("mixtral-8x7b") | step, where).base
    # 8 experts are loaded, a token goes through 2
    h, f = 4096, 14336
    attention = 2 * h * (h + 1024)
    weights = (attention + 8 * 3 * h * f) / (attention + 2 * 3 * h * f)
    assert thresholds(mixture, where).loads == pytest.approx(2868 * weights, rel=1e-3)


def test_sequences_are_dealt_to_equal_micro_batches():
    assert batches(7) == [1, 7]
    assert batches(48) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]


def test_layers_are_dealt_so_that_the_output_layer_costs_no_stage_extra():
    where = machine()
    step = {"seq_length": 4096, "global_batch_size": 8}
    base = make_case(model_options("llama-3-8b") | step, where).base
    shape = Shape(4, 2, 1, 1, 8)
    dealt = list(layouts(base, 4, 4))
    assert dealt[0] is None
    busiest = []
    for layout in dealt:
        one = arrange(base, 4, shape, 8, layout)
        assert sum(len(c.layers) for stage in one.chunks for c in stage) == 32
        assert all(c.layers for stage in one.chunks for c in stage)
        busiest.append(max(sum(times.values()) for times in action_costs(one, 1.0).stages))
    assert busiest[-1] < 0.95 * busiest[0]


def test_an_output_layer_larger_than_a_chunk_leaves_it_one_layer():
    base = case(machine(), vocab_size=2**18, num_layers=17).base
    dealt = list(layouts(base, 4, 4))
    assert dealt
    for layout in dealt:
        one = arrange(base, 4, Shape(4, 2, 1, 1, 8), 8, layout)
        assert min(len(c.layers) for stage in one.chunks for c in stage) == 1
    assert list(layouts(base, 4, 5)) == []


def test_the_search_finds_the_best_of_all_that_it_may_try():
    where = replace(machine(), usable=2.2 * GB)
    asked = case(where, rows=8, seq1f1b_splits=2, micro_batch_size=2)
    found = best_offloaded(asked, [Adam.JUST_IN_TIME])[Adam.JUST_IN_TIME]
    assert found.gpu_bytes <= where.usable
    for v in (2, 4):
        for k in range(1, v + 1):
            shape = Shape(v, k, 1, 2, 4)
            way = offloaded(setting(shape, where), shape, where, asked.runtime, Adam.JUST_IN_TIME)
            if way.gpu_bytes <= where.usable:
                assert found.seconds <= way.seconds * 1.006


def test_nothing_fits():
    where = replace(machine(), usable=0.1 * GB)
    assert best_offloaded(case(where, micro_batch_size=4), [Adam.SERIAL]) == {Adam.SERIAL: None}


def test_resident_needs_what_offloading_saves():
    where = machine()
    shape = Shape(1, 1, 1, 1, 8)
    one = setting(shape, where)
    way = resident(one, shape, where, case(where).runtime)
    assert way.gpu_bytes > max(map(sum, parameters(one))) * 16
    assert way.host_bytes == 0
    assert way.parts.adam == pytest.approx(max(map(sum, parameters(one))) * 30 / (864 * GB * 0.785))


def test_a_schedule_without_slots_is_refused():
    where, shape = machine(), Shape(2, 2, 1, 1, 8)
    one = setting(shape, where)
    costs, link = action_costs(one, where.flops), stage_link(one, where)
    with pytest.raises(ValueError, match="no slots"):
        simulate_visits(shape.bare(4), costs, link, moved(one, where), where, Adam.SERIAL)
    with pytest.raises(ValueError, match="at least 3"):
        simulate_visits(
            shape.schedule(4), costs, link, moved(one, where), where, Adam.SERIAL, num_steps=2
        )
    other = make_case(
        SMALL
        | {"seq_length": 128, "global_batch_size": 8, "recompute_granularity": "selective"}
        | {"recompute_modules": ("mlp",)},
        where,
    )
    with pytest.raises(SettingError, match="mlp"):
        action_costs(arrange(other.base, 4, shape, 8), where.flops)
