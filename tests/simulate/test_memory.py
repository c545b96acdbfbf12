"""Memory per stage over time."""

import pytest
from hypothesis import given, settings

from seq1f1b.schedule import forward_only, gpipe, one_f_one_b
from seq1f1b.simulate import Costs, Memory, memory_over_time, peak_memory, simulate
from tests.schedule.shapes import schedules
from tests.schedule.test_validate import split_backwards


@settings(max_examples=50)
@given(schedules(trains=True, largest=6))
def test_without_a_carry_the_peak_is_that_of_live_sub_sequences(schedule):
    result = simulate(schedule, Costs.uniform(schedule))
    parts = schedule.num_chunks * schedule.num_splits
    peaks = peak_memory(result, Memory.in_micro_batches(schedule))
    assert peaks == pytest.approx([live / parts for live in result.peak_live])


@settings(max_examples=50)
@given(schedules(largest=6))
def test_everything_is_given_back_by_the_end(schedule):
    result = simulate(schedule, Costs.uniform(schedule))
    memory = Memory((1.0,) * schedule.num_splits, carry=10.0, accumulator=100.0)
    for curve in memory_over_time(result, memory):
        times = [time for time, _ in curve]
        assert times == sorted(times)
        assert curve[-1][1] == 0.0
        assert all(held >= 0.0 for _, held in curve)


def test_carry_and_accumulators_live_as_long_as_their_micro_batch_needs_them():
    schedule = one_f_one_b(1, 1, 2)
    result = simulate(schedule, Costs.uniform(schedule, forward=2.0, backward=4.0))
    memory = Memory((1.0, 2.0), carry=10.0, accumulator=100.0)
    # F0 from 0, F1 from 1, B1 from 2 to 4, B0 from 4 to 6
    assert memory_over_time(result, memory)[0] == (
        (0.0, 11.0),
        (1.0, 13.0),
        (2.0, 113.0),
        (4.0, 111.0),
        (6.0, 0.0),
    )


def test_a_deferred_weight_gradient_holds_its_activation():
    schedule = split_backwards(one_f_one_b(1, 2), delay=9)
    result = simulate(schedule, Costs.uniform(schedule))
    assert peak_memory(result, Memory((1.0,))) == (2.0,)


def test_evaluation_holds_one_activation_and_the_carry():
    schedule = forward_only(2, 1, 3, 2)
    result = simulate(schedule, Costs.uniform(schedule))
    assert peak_memory(result, Memory((1.0, 1.0), carry=10.0)) == (11.0, 11.0)


def test_transformer_bytes():
    schedule = one_f_one_b(2, 4, 2)
    memory = Memory.of_transformer(schedule, (600, 424), num_layers=4, hidden_size=64, kv_size=16)
    # 2 layers a stage, 34 bytes per token and hidden unit
    assert memory.activation == (600 * 34 * 64 * 2, 424 * 34 * 64 * 2)
    assert memory.carry == 1024 * 2 * 16 * 2 * 2
    assert memory.accumulator == 600 * 2 * 16 * 2 * 4


def test_without_splits_there_is_no_carry():
    memory = Memory.of_transformer(gpipe(2, 4), (1024,), num_layers=4, hidden_size=64)
    assert (memory.carry, memory.accumulator) == (0.0, 0.0)
