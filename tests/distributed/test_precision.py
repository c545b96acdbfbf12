"""Half precision under sub-sequences: losses within its noise, loss scaling as with one split."""

import re

import pytest

from tests.distributed.training_runs import ARGUMENTS, SCRIPTS, run_ranks
from tests.selection import mostly_long

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

_ITERATION = re.compile(
    r"iteration +\d+/(?:.*?lm loss: (\S+))?.*?loss scale: (\S+).*?skipped iterations: +(\d+)"
)
_ROUNDING = {"--fp16": 2**-11, "--bf16": 2**-8}


def logged(*flags: object) -> list[tuple[float, float, int]]:
    """Train and return loss (0 where skipped), loss scale and skipped iterations as logged."""
    run = run_ranks(
        2, "-m", "megatron.adaptor", SCRIPTS / "plain_gpt.py", *ARGUMENTS,
        "--pipeline-model-parallel-size", 2, "--train-iters", 6, *flags,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return [
        (float(loss or 0), float(scale), int(skipped))
        for loss, scale, skipped in _ITERATION.findall(run.stdout)
    ]


@pytest.mark.parametrize("precision", mostly_long(_ROUNDING, default=["--bf16"]))
def test_losses_differ_by_rounding(precision):
    flags = (precision, "--initial-loss-scale", 2**16)
    whole, cut = (logged(*flags, "--seq1f1b-splits", s) for s in (1, 3))
    assert len(whole) == len(cut) == 6
    for (loss, *scaling), (cut_loss, *cut_scaling) in zip(whole, cut, strict=True):
        assert cut_loss == pytest.approx(loss, rel=_ROUNDING[precision] / 4)
        assert cut_scaling == scaling
    assert cut[-1][0] < cut[0][0]


def test_overflow_skips_the_same_iterations():
    flags = ("--fp16", "--initial-loss-scale", 2**32, "--hysteresis", 1)
    whole, cut = (logged(*flags, "--seq1f1b-splits", s) for s in (1, 3))
    scales, cut_scales = ([entry[1:] for entry in entries] for entries in (whole, cut))
    assert cut_scales == scales
    assert scales[0] == (2**31, 1)
    assert len(scales) == 6
