"""Training loops that never see Megatron's command line, and turn sub-sequences on by a call."""

import json
import re
from pathlib import Path

import pytest

from tests.distributed.training_runs import SCRIPTS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_alone(*arguments):
    """Run a script on 2 ranks without the adaptor under Megatron's training."""
    return run_ranks(2, *arguments, with_megatron=False)


def answer(run):
    assert run.returncode == 0, run.stderr[-4000:]
    line = next(line for line in run.stdout.splitlines() if "ANSWER" in line)
    return json.loads(line.partition("ANSWER")[2])


def test_the_example_trains_alike_with_and_without_sub_sequences():
    losses = {}
    for splits in (1, 3):
        run = run_alone(EXAMPLES / "own_loop.py", "--splits", splits, "--length", 64)
        assert run.returncode == 0, run.stderr[-4000:]
        assert ("3 sub-sequences" in run.stdout) == (splits == 3)
        losses[splits] = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", run.stdout)]
    assert len(losses[1]) == 10
    assert losses[1][-1] < 0.95 * losses[1][0]
    assert losses[3] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.long
def test_gradients_are_those_of_megatrons_own_loop():
    found, errors = answer(run_alone(SCRIPTS / "enabled_loops.py", EXAMPLES))
    assert found.pop("evaluation") == 0  # of stage 0, which has no loss
    assert len(found) == 9
    assert max(found.values()) < 1e-12
    for name, complaint in {
        "stale": "call megatron.adaptor.enable() before get_forward_backward_func is called",
        "positions": "'position_ids' of the model's inputs differs",
        "dropout": "attention_dropout must be 0 with sub-sequences",
        "fusion": "schedule zb-h1: leave out no_gradient_accumulation_fusion",
        "ranks": "what enable() was given is Request(splits=2",
        "tuples": "the data iterator delivers tuple, which cannot be cut",
    }.items():
        assert complaint in errors[name]
