"""What changes with transformer-engine's layers, seen without the package: flags and lengths."""

import pytest

from tests.programs import ask

# The command line is one that runs anywhere; what needs the package is set on its arguments.
_PROGRAM = """
import dataclasses, json, sys
from megatron.adaptor import install
install()
from megatron.adaptor.command_line.refusals import settings_from
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import validate_args
from tests.programs import parse_args
answers = {}
for name, (flags, values) in json.loads(sys.stdin.read()).items():
    sys.argv = ["script", *flags.split()]
    args = parse_args()
    validate_args(args)
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2)
    config = dataclasses.replace(config, num_layers=4)
    vars(args).update(values)
    settings, faults = settings_from(args)
    answers[name] = {
        "lengths": [part.length for part in settings.cut(args.seq_length)] if not faults else [],
        "faults": faults,
        "always_adds": config.disable_parameter_transpose_cache,
        "delays": config.delay_wgrad_compute,
    }
print("ANSWER" + json.dumps(answers))
"""
_BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 1152 "
    "--max-position-embeddings 1152 --micro-batch-size 1 --global-batch-size 4 --train-iters 4 "
    "--attention-dropout 0 --pipeline-model-parallel-size 2 --disable-bias-linear "
)
_CUT, _SPLIT = "--seq1f1b-splits 3", "--seq1f1b-splits 3 --seq1f1b-schedule zb-h1"
_TENSOR = f"{_CUT} --tensor-model-parallel-size 2 --sequence-parallel"
_CONTEXT = f"{_CUT} --context-parallel-size 2 --cp-comm-type a2a"
_ENGINE = {"transformer_impl": "transformer_engine"}
_FP8 = {"fp8": "hybrid", "fp8_recipe": "delayed"}
CASES = {
    "whole": ("", {}),
    "cut": (_CUT, _ENGINE),
    "split": (_SPLIT, _ENGINE),
    "split with biases": (_SPLIT, _ENGINE | {"add_bias_linear": True}),
    "split with biases of queries": (_SPLIT, _ENGINE | {"add_qkv_bias": True}),
    "FP8": (_CUT, _FP8),
    "MXFP8": (_CUT, {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
    "FP4": (_CUT, {"fp4": "e2m1", "fp4_recipe": "nvfp4"}),
    "FP8 under tensor parallelism": (_TENSOR, _FP8),
    "FP8 under context parallelism": (_CONTEXT, _FP8),
    "FP8, too short": (f"{_CUT.replace('3', '75')}", _FP8),
    "overlap of tensor parallelism": (_CUT, {"tp_comm_overlap": True}),
}


@pytest.fixture(scope="module")
def answers():
    lines = {name: (_BASE + flags, values) for name, (flags, values) in CASES.items()}
    return ask(_PROGRAM, lines, RANK="0", WORLD_SIZE="4")


@pytest.mark.parametrize(
    "name, always_adds, delays",
    [("whole", False, False), ("cut", True, False), ("split", True, True)],
)
def test_layers_are_told_how_to_keep_gradients(answers, name, always_adds, delays):
    assert answers[name]["faults"] == []
    assert (answers[name]["always_adds"], answers[name]["delays"]) == (always_adds, delays)


@pytest.mark.parametrize(
    "name, multiple",
    [
        ("FP8", 16),
        ("MXFP8", 32),
        ("FP4", 128),
        ("FP8 under tensor parallelism", 32),
        ("FP8 under context parallelism", 32),
    ],
)
def test_every_rank_has_the_tokens_that_a_product_takes(answers, name, multiple):
    assert answers[name]["faults"] == []
    lengths = answers[name]["lengths"]
    assert sum(lengths) == 1152
    assert all(length % multiple == 0 for length in lengths)
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("name", ["split with biases", "split with biases of queries"])
def test_biases_cannot_wait(answers, name):
    [fault] = answers[name]["faults"]
    assert "--seq1f1b-schedule zb-h1 with --transformer-impl transformer_engine" in fault
    assert "--disable-bias-linear and no --add-qkv-bias" in fault


def test_what_cannot_be_cut(answers):
    [fault] = answers["FP8, too short"]["faults"]
    assert "--fp8-format hybrid take tokens 16 at a time" in fault
    [fault] = answers["overlap of tensor parallelism"]["faults"]
    assert fault.startswith("--tp-comm-overlap has buffers as long as a whole micro-batch")
