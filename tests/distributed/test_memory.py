"""Peak activation memory through Megatron against the formula, and the KV carry to the byte."""

from dataclasses import replace

import pytest

from tests.distributed.megatron_model import (
    BATCH,
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    Case,
    worst_gradient_error,
)

pytestmark = pytest.mark.distributed

LENGTH, SPLITS = 256, 4
FLOAT32 = 4


def stage_figures(case):
    """Return peak activation bytes and KV-carry bytes of this stage."""
    from megatron.adaptor import install

    worst_gradient_error(case)
    figures = install().meter.last
    return figures.peak_activation_bytes, figures.kv_carry_bytes


@pytest.mark.parametrize("kind", ["1f1b", "zb-h1"])
def test_a_recomputed_loss_keeps_logits_of_one_sub_sequence(workers, kind):
    vocabulary = 4096
    case = Case(2, 2, SPLITS, "average", kind, length=LENGTH, vocabulary=vocabulary)
    pool = workers(2)
    kept, anew = (
        [peak for peak, _ in pool.run(stage_figures, replace(case, recompute_loss=recomputes))]
        for recomputes in (False, True)
    )
    whole = FLOAT32 * BATCH * LENGTH * vocabulary
    assert kept[1] - anew[1] == pytest.approx((SPLITS - 1) / SPLITS * whole, rel=0.05)
    assert kept[0] == anew[0]


def carry_bytes(num_stages, *, num_tokens, in_flight):
    """Bytes of keys and values: whole sequences of ``in_flight``, gradients of ``num_tokens``."""
    per_token = 2 * BATCH * GROUPS * (HIDDEN // HEADS) * FLOAT32 * (LAYERS // num_stages)
    return per_token * (in_flight * LENGTH + num_tokens)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_stages", [2, 4])
def test_first_stage_follows_the_formula(workers, num_stages):
    # Without rotary positions keys and values are views of one projection, so that what plain 1F1B
    # keeps of them is exactly their size.
    case = Case(
        num_stages, 4, SPLITS, "average", length=LENGTH, positions="learned_absolute", tied=False
    )
    pool = workers(num_stages)
    plain, _ = pool.run(stage_figures, replace(case, num_splits=1))[0]
    cut, carried = pool.run(stage_figures, case)[0]

    # s + p - 1 sub-sequences in a row reach, at worst, from the first of one micro-batch on.
    in_flight = 1 + -(-(SPLITS + num_stages - 2) // SPLITS)
    before_last = LENGTH - LENGTH // SPLITS
    expected_carry = carry_bytes(num_stages, num_tokens=before_last, in_flight=in_flight)
    assert carried == expected_carry

    # (s + p - 1) / s micro-batches, of which keys and values are counted by the carry.
    of_one = plain / num_stages - carry_bytes(num_stages, num_tokens=0, in_flight=1)
    expected = (SPLITS + num_stages - 1) / SPLITS * of_one + carried
    assert cut == pytest.approx(expected, rel=0.10)
    assert cut < 0.8 * plain
