"""What the planner chooses and warns of when Megatron's arguments are known."""

import shlex

import pytest

from tests.planner.described import describe_this_machine
from tests.programs import ask

_PROGRAM = """
import contextlib, io, json, sys
from megatron.adaptor import install
install()
from megatron.adaptor.reports.outlook import MemoryLine, advice, setting_of
from megatron.training.arguments import validate_args
from tests.programs import parse_args
answers = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["script", *words]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            args = parse_args()
            validate_args(args)
            MemoryLine(lambda: True).report_theoretical_memory(None, args)
            found = [args.seq1f1b_splits, list(setting_of(args).lengths), list(advice(args))]
        answers.append([out.getvalue(), *found])
    except SystemExit as error:
        answers.append(["refused", str(error), [], []])
print("ANSWER" + json.dumps(answers))
"""

_BASE = shlex.split(
    "--num-layers 8 --hidden-size 256 --num-attention-heads 4 --seq-length 8192 "
    "--max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 8 --train-iters 4 "
    "--attention-dropout 0 --hidden-dropout 0 --position-embedding-type rope --vocab-size 20000"
)
_OFFLOAD = shlex.split(
    "--use-distributed-optimizer --num-virtual-stages-per-pipeline-rank 2 --offload-model-chunks 1"
)
_PIPELINE = ("--pipeline-model-parallel-size", "4")

CASES = {
    "auto": [*_BASE, *_PIPELINE, "--seq1f1b-splits", "auto"],
    "uneven": [*_BASE, *_PIPELINE, "--seq1f1b-splits", "4", "--seq1f1b-balance-method", "average"],
    "no pipeline": [*_BASE, "--seq1f1b-splits", "4"],
    "over-split": [*_BASE, *_PIPELINE, "--seq1f1b-splits", "64"],
    "auto, offloaded": [*_BASE, *_PIPELINE, *_OFFLOAD, "--seq1f1b-splits", "auto"],
    "offloaded": [*_BASE, *_PIPELINE, *_OFFLOAD, "--seq1f1b-splits", "4"],
    "lengths": [*_BASE, *_PIPELINE, "--seq1f1b-lengths", "4096", "2048", "2048"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    described = describe_this_machine(tmp_path_factory.mktemp("home"))
    return dict(
        zip(
            CASES,
            ask(_PROGRAM, list(CASES.values()), RANK="0", WORLD_SIZE="4", **described),
            strict=True,
        )
    )


def test_auto_picks_a_number_and_prints_why(answers):
    printed, splits, lengths, _ = answers["auto"]
    assert splits in (1, 2, 4, 8, 16)
    assert len(lengths) == splits
    assert f"--seq1f1b-splits auto: {splits}, " in printed
    assert "shortest step of" in printed


def test_auto_is_refused_where_the_planner_has_no_model(answers):
    refused, message, *_ = answers["auto, offloaded"]
    assert refused == "refused"
    assert "--seq1f1b-splits auto: --offload-model-chunks: seq1f1b plan-offload plans" in message
    assert message.endswith("; or give a number of splits")


def test_no_memory_is_estimated_of_what_the_planner_has_no_model_of(answers):
    assert "Memory of stage 3 with 4 sub-sequences" in answers["uneven"][0]
    printed = answers["offloaded"][0]
    assert "Memory of stage" not in printed
    assert "not estimated: --offload-model-chunks: seq1f1b plan-offload plans" in printed


@pytest.mark.parametrize(
    "name, warning",
    [
        ("uneven", "--seq1f1b-balance-method average: the longest sub-sequence takes"),
        ("uneven", "--pipeline-model-parallel-layout"),
        ("no pipeline", "without pipeline stages sub-sequences save no time and cost memory"),
        ("over-split", "tokens are too short to pay"),
    ],
)
def test_what_costs_is_warned_of(answers, name, warning):
    *_, found = answers[name]
    assert any(warning in text for text in found), found


def test_given_lengths_are_those_of_the_setting(answers):
    _, splits, lengths, _ = answers["lengths"]
    assert splits is None
    assert lengths == [4096, 2048, 2048]
