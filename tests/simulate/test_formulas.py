"""The closed forms at the numbers that papers print."""

import pytest

from seq1f1b.simulate import formulas


def test_bubble_ratio_of_1f1b_interleaved_and_sub_sequences():
    assert formulas.bubble_ratio(8, 1, 8, 1) == pytest.approx(7 / 15)
    assert formulas.bubble_ratio(8, 2, 8, 1) == pytest.approx(3.5 / 11.5)
    assert formulas.bubble_ratio(8, 1, 8, 4) == pytest.approx(1.75 / 9.75)
    assert formulas.bubble_ratio(1, 1, 8, 4) == 0.0


def test_speedup_over_1f1b():
    assert formulas.speedup_over_1f1b(2, 1, 2, 4) == pytest.approx(3 / 2.25)
    assert formulas.speedup_over_1f1b(2, 1, 4, 4) == pytest.approx(5 / 4.25)
    assert formulas.speedup_over_1f1b(4, 1, 7, 1) == 1.0


def test_step_time():
    assert formulas.step_time(4, 1, 8, 1) == 33.0
    assert formulas.step_time(4, 1, 8, 2, forward=2.0, backward=2.0) == 38.0


def test_a_zero_bubble_of_equal_thirds_is_a_third_of_1f1bs():
    assert formulas.zb_h1_bubble(4, 1) == pytest.approx(3 * 3.0 / 3)
    assert formulas.zb_h1_bubble(4, 2) == pytest.approx(1.5)
    assert formulas.zb_h1_bubble(4, 1, input_gradient=0.5, weight_gradient=0.25) == 3 * 1.25
    assert formulas.zb_h1_bubble(4, 1, weight_gradient=5.0) == 3.0
    assert formulas.zb_h1_bubble_ratio(4, 8, 2) == pytest.approx(1.5 / 25.5)
    assert not formulas.zb_h1_applies(4, 2, 2)
    assert formulas.zb_h1_applies(4, 3, 2)


def test_live_micro_batches():
    assert formulas.live_micro_batches(8, 16, 1) == 8
    assert formulas.live_micro_batches(8, 16, 4) == 11 / 4
    assert formulas.live_micro_batches(8, 16, 4, stage=7) == 1
    assert formulas.live_micro_batches(8, 2, 1) == 2
    assert formulas.live_micro_batches(8, 16, 1, num_chunks=2) == 8 * (1 + 7 / 16)
    assert formulas.live_micro_batches(8, 2, 1, num_chunks=2) == 2
