"""Each kind of figure has a picture, whatever the runs came to."""

import dataclasses

import matplotlib.image
import pytest

from seq1f1b_tools.sweep.charts import draw_charts
from seq1f1b_tools.sweep.models import MODELS
from seq1f1b_tools.sweep.plan import Run
from seq1f1b_tools.sweep.records import summarize
from seq1f1b_tools.sweep.report import Result

NAMES = ["throughput.png", "memory.png", "bubble.png", "loss.png"]


def run(number, splits, balance):
    model = next(iter(MODELS.values()))
    return Run(model, 4096, number, splits, balance, 1, 1, 1, 2, 1, 2, 12)


def summary(speed, bubble, losses):
    entries = [
        {
            "iteration": place + 1,
            "lm_loss": loss,
            "milliseconds": 100 / speed,
            "tokens_per_second": 40960.0 * speed,
            "tflops_per_device": 0.1 * speed,
            "peak_activation_bytes": [2.0**27 / speed, 2.0**26],
            "kv_carry_bytes": [2**20, 2**20],
            "bubble_ratio": [bubble, bubble / 2],
        }
        for place, loss in enumerate(losses)
    ]
    return summarize(entries, 2)


def results():
    losses = [10.4 - 0.3 * place for place in range(12)]
    variants = [(1, None), (4, "average"), (4, "uniform_comp")]
    made = []
    for number in (2, 4):
        baseline = summary(1.0, 0.33 / number * 2, losses)
        for splits, balance in variants:
            speed = 1.0 if splits == 1 else 1.1 + 0.1 * (balance == "uniform_comp")
            own = summary(speed, 0.33 / number * 2 / splits, losses)
            made.append(Result(run(number, splits, balance), "ok", summary=own, baseline=baseline))
    made.append(Result(run(4, 8, "average"), "oom", error="out of memory"))
    return made


def test_bubbles_are_kept_by_stage():
    assert summary(1.0, 0.3, [2.0] * 5).bubble_by_stage == pytest.approx((0.3, 0.15))


def test_every_kind_is_drawn(tmp_path):
    files = draw_charts(results(), tmp_path)
    assert [file.name for file in files] == NAMES
    for file in files:
        picture = matplotlib.image.imread(file)
        assert picture.shape[1] > 600
        assert picture[..., :3].std() > 0.05  # not an empty sheet


def test_losses_that_are_not_there_leave_a_gap(tmp_path):
    gap = dataclasses.replace(results()[0], summary=summary(1.0, 0.3, [3.0, None, 2.0, None]))
    assert len(draw_charts([gap], tmp_path)) == len(NAMES)


def test_nothing_measured_draws_nothing(tmp_path):
    assert draw_charts([Result(run(2, 1, None), "failed")], tmp_path) == []
    assert not list(tmp_path.iterdir())
