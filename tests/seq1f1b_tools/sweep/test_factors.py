"""A measured speedup as a product: theory, ends, splitting, executor."""

import math
from dataclasses import replace

import pytest

from seq1f1b_tools.sweep.factors import factors
from seq1f1b_tools.sweep.models import MODELS
from seq1f1b_tools.sweep.plan import Run
from seq1f1b_tools.sweep.records import Summary, summarize

RUN = Run(MODELS["tiny"], 64, 4, 2, "average", 1, 1, 1, 2, 1, 2, 8)
WHOLE = ({"0F.0": 10.0, "0B.0": 20.0}, {"0F.0": 10.0, "0B.0": 20.0})
HALVES = ({"0F.0": 5.0, "0F.1": 5.0, "0B.0": 10.0, "0B.1": 10.0},) * 2


def summary(actions: tuple[dict[str, float], ...]) -> Summary:
    return Summary((1.0,), 1.0, 1.0, (1.0,), (0.0,), 0.1, (0.1,), (1.0,), actions)


def test_equal_actions_leave_theory_alone():
    found = factors(RUN, summary(HALVES), summary(WHOLE), RUN.speedup)
    assert found is not None
    assert found.theory == pytest.approx(10 / 9)
    assert [found.ends, found.splitting, found.executor] == pytest.approx([1, 1, 1])


def test_a_longer_last_stage_is_in_ends():
    ends = (WHOLE[0], {"0F.0": 15.0, "0B.0": 30.0})
    dealt = (HALVES[0], {name: 1.5 * time for name, time in HALVES[1].items()})
    found = factors(RUN, summary(dealt), summary(ends), 1.05)
    assert found is not None
    # The last stage works 4 x 45; before it lies one forward of the first, after it a backward.
    assert found.ends == pytest.approx((4 * 45 + 30) / (4 * 45 + 15) / found.theory)
    assert found.splitting == pytest.approx(1)
    assert math.prod(vars(found).values()) == pytest.approx(1.05)


def test_slower_sub_sequences_are_in_splitting():
    slower = tuple({name: 1.1 * time for name, time in stage.items()} for stage in HALVES)
    found = factors(RUN, summary(slower), summary(WHOLE), 1.0)
    assert found is not None
    assert found.ends == pytest.approx(1)
    assert found.splitting == pytest.approx(1 / 1.1)


@pytest.mark.parametrize("actions", [(), ({"0F.0": 5.0},) * 2, ({"0F.0": 5.0, "0B.0": 5.0},) * 2])
def test_missing_actions_give_none(actions):
    assert factors(RUN, summary(actions), summary(WHOLE), 1.0) is None
    chunks = replace(RUN, num_splits=1, num_chunks=2)
    assert factors(chunks, summary(WHOLE), summary(WHOLE), 1.0) is None


def test_actions_are_medians_where_all_iterations_name_them():
    def entry(*milliseconds: float) -> dict[str, object]:
        return {
            "milliseconds": 1.0,
            "tokens_per_second": 1.0,
            "tflops_per_device": 1.0,
            "peak_activation_bytes": [0],
            "kv_carry_bytes": [0],
            "bubble_ratio": [0.0],
            "lm_loss": 1.0,
            "action_milliseconds": [{f"0F.{j}": time for j, time in enumerate(milliseconds)}],
        }

    found = summarize([entry(1.0, 9.0), entry(2.0, 7.0), entry(9.0, 8.0)], 0)
    assert found is not None
    assert found.action_milliseconds == ({"0F.0": 2.0, "0F.1": 8.0},)
    found = summarize([entry(1.0, 9.0), entry(2.0)], 0)
    assert found is not None
    assert found.action_milliseconds == ()
