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


WHOLE_FIRST = """
import json, sys
from functools import partial
from itertools import cycle
sys.path.insert(0, sys.argv[1])
import own_loop
import torch
from megatron.adaptor import enable

own_loop.join()
torch.manual_seed(1)
model = own_loop.build(own_loop.configuration(torch.float64), 48).double()
batch = next(own_loop.sequences(48, 2))
batch["weights"] = batch["weights"].double()


def made_positions_step(data, model):
    batch = next(data)
    places = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
    losses = model(batch["input_ids"], places, None, labels=batch["labels"])
    return losses, partial(own_loop.weighted_loss, batch["weights"])


def gradients(splits, forward_step):
    enable(splits=splits, schedule="1f1b")
    own_loop.forward_step = forward_step
    own_loop.step(model, cycle([batch]), length=48, rows=2, number=4)
    return torch.cat([p.main_grad.flatten() for p in model.parameters()])


usual = own_loop.forward_step
whole, cut = gradients(1, usual), gradients(3, usual)
gradients(1, made_positions_step)
try:
    gradients(3, made_positions_step)
    message = "none"
except Exception as error:
    message = str(error)
differs = ((whole - cut).abs().max() / whole.abs().max()).item()
if torch.distributed.get_rank() == 0:
    print("ANSWER" + json.dumps([differs, message]))
"""


def test_a_forward_step_is_checked_in_its_first_step_of_sub_sequences(tmp_path):
    """A step of whole micro-batches before, as with one split or to verify, shows nothing."""
    script = tmp_path / "whole_first.py"
    script.write_text(WHOLE_FIRST)
    differs, message = answer(run_ranks(1, script, EXAMPLES, with_megatron=False))
    assert differs < 1e-12
    assert "'position_ids' of the model's inputs differs" in message
