"""The KV carry's buffers: counted to the byte, handed out again, all back at the end of a step."""

import pytest
import torch

from seq1f1b.attention import CarryPool
from seq1f1b.runtime import ExecutionContext
from seq1f1b.schedule import Action
from seq1f1b.sequence import sub_sequences

PARTS = sub_sequences((6, 5, 4))
TOTAL, BATCH, HEADS, DIM = 15, 2, 3, 4


def carry_of(pool, micro_batch, dtype=torch.float32):
    like = torch.ones(1, BATCH, HEADS, DIM, dtype=dtype)
    return pool.carry(micro_batch, "layer", TOTAL, like, like)


def add_ones(carry, part):
    ones = torch.ones(part.start, BATCH, HEADS, DIM)
    carry.add_before(part, ones, ones)


def test_bytes_are_those_of_the_formula():
    pool = CarryPool()
    token = BATCH * HEADS * DIM * 2  # keys and values
    carry = carry_of(pool, 0, torch.bfloat16)
    assert pool.bytes_in_use == TOTAL * token * 2
    add_ones(carry, PARTS[2])
    # float32 accumulators for what the last sub-sequence attends to besides itself
    assert pool.bytes_in_use == TOTAL * token * 2 + 11 * token * 4
    add_ones(carry, PARTS[1])
    assert pool.bytes_in_use == pool.peak_bytes == TOTAL * token * 2 + 11 * token * 4
    pool.release(0)
    assert pool.bytes_in_use == 0
    pool.check_whole()


def test_buffers_are_used_again():
    pool = CarryPool()
    for micro_batch in range(5):
        add_ones(carry_of(pool, micro_batch), PARTS[2])
        pool.release(micro_batch)
    assert pool.bytes_held == pool.peak_bytes


def test_accumulators_forget_and_add_up():
    pool = CarryPool()
    for micro_batch in range(2):
        carry = carry_of(pool, micro_batch)
        assert carry.gradients_of(PARTS[2]) is None
        for part in (PARTS[2], PARTS[1]):
            add_ones(carry, part)
        keys, values = carry.gradients_of(PARTS[1])
        assert torch.equal(keys, torch.ones(5, BATCH, HEADS, DIM))
        assert torch.equal(values, keys)
        keys, _ = carry.gradients_of(PARTS[0])
        assert torch.equal(keys, torch.full((6, BATCH, HEADS, DIM), 2.0))
        pool.release(micro_batch)


def test_what_is_not_given_back_is_named():
    pool = CarryPool()
    carry_of(pool, "micro-batch 3")
    with pytest.raises(AssertionError, match="micro-batch 3"):
        pool.check_whole()


def test_peak_can_be_measured_again():
    pool = CarryPool()
    carry_of(pool, 0)
    pool.release(0)
    assert pool.peak_bytes > 0
    pool.reset_peak()
    assert pool.peak_bytes == 0


def test_buffers_of_other_lengths_are_freed():
    pool = CarryPool()
    keys = torch.zeros(4, 1, 2, 8)
    held = []
    for total in (16, 32, 16, 8):
        pool.carry("micro-batch", "layer", total, keys, keys)
        pool.release("micro-batch")
        pool.trim()
        held.append(pool.bytes_held)
    per_token = 2 * 2 * 8 * 4
    assert held == [total * per_token for total in (16, 32, 16, 8)]
    pool.carry("micro-batch", "layer", 5, keys, keys, reuse=False)
    pool.release("micro-batch")
    pool.trim()
    assert pool.bytes_held == 8 * per_token


def test_a_failed_step_leaves_nothing():
    context = ExecutionContext()
    keys = torch.zeros(4, 1, 2, 8)

    def fail():
        with context.step():
            context.carries.carry("micro-batch", "layer", 16, keys, keys)
            deferring = Action.parse("0I0.0")
            context.weight_gradients.add(deferring, lambda x, y: None, keys, keys)
            raise RuntimeError("it fails")

    with pytest.raises(RuntimeError, match="it fails"):
        fail()
    context.carries.check_whole()
    context.weight_gradients.check_empty()
    assert context.carries.bytes_held == 0
    assert context.weight_gradients.bytes_in_use == 0
