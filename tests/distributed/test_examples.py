"""The examples run, and train."""

import re
from pathlib import Path

import pytest

from tests.distributed.training_runs import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_without_megatron():
    losses = {}
    for splits in (1, 3):
        run = run_ranks(2, EXAMPLES / "without_megatron.py", "--splits", splits, "--steps", 8)
        assert run.returncode == 0, run.stderr[-4000:]
        losses[splits] = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", run.stdout)]
    assert len(losses[1]) == 8
    assert losses[1][-1] < 0.8 * losses[1][0]
    assert losses[3] == pytest.approx(losses[1], rel=1e-3)
