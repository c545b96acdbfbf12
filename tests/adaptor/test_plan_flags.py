"""What the planner prints passes Megatron's parser and validation."""

import pytest

from seq1f1b.planner.gpu import gpu
from seq1f1b.planner.launch import flags
from seq1f1b.planner.presets import model_options
from seq1f1b.planner.problem import Problem
from seq1f1b.planner.search import search
from tests.programs import ask

_PROGRAM = """
import json, os, sys
from megatron.adaptor import install
install()
from megatron.training.arguments import validate_args
from tests.programs import parse_args
answers = []
for words, gpus in json.loads(sys.stdin.read()):
    os.environ["WORLD_SIZE"] = str(gpus)
    sys.argv = ["script", *words, "--train-iters", "3", "--lr", "1e-4"]
    try:
        args = parse_args()
        validate_args(args)
        splits = args.seq1f1b_splits or len(args.seq1f1b_lengths or "1")
        answers.append(["ok", args.data_parallel_size, splits])
    except (SystemExit, Exception) as error:
        answers.append([type(error).__name__, str(error), None])
print("ANSWER" + json.dumps(answers))
"""

CASES = {
    "dense": ("llama-13b", 32, "a100-80g", 65536, 128, {}),
    "large vocabulary": ("llama-3-8b", 64, "h100", 32768, 64, {"pipeline_model_parallel_size": 8}),
    "experts": ("mixtral-8x7b", 64, "h100", 32768, 64, {}),
    "latent attention": ("deepseek-v2-lite", 64, "h200", 32768, 64, {}),
    "tied embeddings": ("qwen3-4b", 16, "a100-40g", 32768, 32, {}),
    "biases": ("gpt-2.7b", 8, "a100-80g", 32768, 16, {}),
}


pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def plans():
    return {
        name: search(
            Problem(
                model_options(model) | {"seq_length": length, "global_batch_size": batch} | fixed,
                gpus,
                gpu(kind),
                8,
            )
        )
        for name, (model, gpus, kind, length, batch, fixed) in CASES.items()
    }


def test_every_row_passes_megatrons_validation(plans):
    rows = [(name, row.setting) for name, plan in plans.items() for row in plan.rows]
    answers = ask(_PROGRAM, [[flags(setting), setting.num_gpus] for _, setting in rows])
    for (name, setting), (verdict, data, splits) in zip(rows, answers, strict=True):
        assert verdict == "ok", (name, flags(setting), data)
        assert data == setting.data
        assert splits == setting.num_splits


def test_something_fits_in_every_case(plans):
    assert all(plan.rows for plan in plans.values())
