"""Flags that cannot work end the program before any process group is made, all of them listed."""

import shlex
from pathlib import Path

import pytest

from tests.programs import ask

ROOT = Path(__file__).parents[2]

# Parses and validates each command line that it reads, in one process: Megatron's import is slow.
_PROGRAM = """
import json, sys
from megatron.adaptor import install
install()
import torch
from megatron.adaptor.command_line.refusals import settings_from
from megatron.training.arguments import validate_args
from tests.programs import parse_args
answers = []
for argv in json.loads(sys.stdin.read()):
    sys.argv = ["script", *argv]
    try:
        args = parse_args()
        validate_args(args)
        settings, _ = settings_from(args)
        lengths = [part.length for part in settings.cut(args.seq_length)]
        answers.append(["ok", settings.num_splits, lengths])
    except SystemExit as error:
        answers.append(["exit", str(error.code), torch.distributed.is_initialized()])
print("ANSWER" + json.dumps(answers))
"""

_BASE = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 4 --train-iters 4 "
    "--attention-dropout 0 --pipeline-model-parallel-size 2"
)

_EXPERTS = ("--seq1f1b-splits", "4", "--num-experts", "4", "--disable-bias-linear")
_GREEDY = ("--seq1f1b-splits", "4", "--seq1f1b-schedule", "greedy")

_AHEAD = shlex.split("--seq1f1b-splits 4 --mtp-num-layers 2 --position-embedding-type rope")

REFUSED = {
    "no splits": (
        ["--seq1f1b-splits", "0"],
        ["--seq1f1b-splits 0: must be at least 1"],
    ),
    "negative splits": (["--seq1f1b-splits", "-3"], ["--seq1f1b-splits -3: must be at least 1"]),
    "more splits than tokens": (
        ["--seq1f1b-splits", "129"],
        ["--seq1f1b-splits 129 with --seq-length 128", "need a sequence of 129 tokens"],
    ),
    "lengths that cannot be aligned": (
        ["--seq1f1b-splits", "65", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
        ["65 splits of at least 2 token(s)", "--sequence-parallel", "2 at a time"],
    ),
    "lengths of another sequence": (
        ["--seq1f1b-lengths", "64", "32"],
        ["--seq1f1b-lengths 64 32: sum to 96, not to --seq-length 128"],
    ),
    "lengths and another number of splits": (
        ["--seq1f1b-lengths", "64", "64", "--seq1f1b-splits", "4"],
        ["--seq1f1b-lengths 64 64: 2 lengths for 4 splits"],
    ),
    "lengths that cannot be dealt out": (
        shlex.split("--seq1f1b-lengths 65 63 --tensor-model-parallel-size 2 --sequence-parallel"),
        ["--seq1f1b-lengths 65 63: must be positive multiples of 2"],
    ),
    "a number of splits by nothing": (
        ["--seq1f1b-splits", "auto"],
        ["--seq1f1b-splits auto: there is no description of this device", "seq1f1b calibrate"],
    ),
    "a cap without greedy": (
        ["--seq1f1b-splits", "4", "--seq1f1b-max-live", "9"],
        ["--seq1f1b-max-live 9 goes with --seq1f1b-schedule greedy only"],
    ),
    "a cap below one micro-batch": (
        [*_GREEDY, "--seq1f1b-max-live", "3"],
        ["--seq1f1b-schedule greedy: a cap of 3 sub-sequences does not hold one micro-batch"],
    ),
    "more chunks on the device than there are": (
        shlex.split(
            "--num-virtual-stages-per-pipeline-rank 2 --use-distributed-optimizer "
            "--offload-model-chunks 3"
        ),
        ["--offload-model-chunks 3: must be from 0 to the model chunks of a stage, which are 2"],
    ),
    "fewer chunks on the device than none": (
        ["--num-virtual-stages-per-pipeline-rank", "2", "--offload-model-chunks", "-1"],
        ["--offload-model-chunks -1: must be from 0"],
    ),
    "a link that copies nothing, and roots of other stages": (
        shlex.split(
            "--num-virtual-stages-per-pipeline-rank 2 --use-distributed-optimizer "
            "--offload-model-chunks 1 --offload-link-gb-per-s 0 --offload-link-roots 0,0,1"
        ),
        [
            "--offload-link-gb-per-s 0: must be above 0",
            "--offload-link-roots 0,0,1: 3 numbers for 2 stages: give one for each stage",
        ],
    ),
    "turns too short for the stages": (
        shlex.split(
            "--num-virtual-stages-per-pipeline-rank 2 --seq1f1b-splits 2 --seq1f1b-turn 1 "
        ),
        ["turns of 1 on 2 stages"],
    ),
    "zb-h1 with virtual stages": (
        ["--seq1f1b-schedule", "zb-h1", "--num-virtual-stages-per-pipeline-rank", "2"],
        ["--seq1f1b-schedule zb-h1: zb-h1 has 1 model chunk a stage, not 2: use greedy"],
    ),
    "split backwards without accumulation": (
        [*_GREEDY, "--no-gradient-accumulation-fusion"],
        ["--seq1f1b-schedule greedy: leave out --no-gradient-accumulation-fusion"],
    ),
    "a trace of the interleaved loop": (
        ["--num-virtual-stages-per-pipeline-rank", "2", "--seq1f1b-trace-file", "trace.jsonl"],
        ["--seq1f1b-trace-file cannot tell", "add --seq1f1b-schedule 1f1b"],
    ),
    "attention dropout": (
        ["--seq1f1b-splits", "4", "--attention-dropout", "0.1"],
        ["--attention-dropout must be 0", "add --attention-dropout 0"],
    ),
    "context parallelism in a ring": (
        ["--seq1f1b-splits", "4", "--context-parallel-size", "2"],
        ["--cp-comm-type must be a2a", "add --cp-comm-type a2a"],
    ),
    "more ranks than heads of keys": (
        shlex.split(
            "--seq1f1b-splits 4 --context-parallel-size 2 --cp-comm-type a2a "
            "--group-query-attention --num-query-groups 1"
        ),
        ["--context-parallel-size times --tensor-model-parallel-size must divide the heads"],
    ),
    "lengths that context parallelism cannot deal out": (
        shlex.split("--seq1f1b-splits 33 --context-parallel-size 2 --cp-comm-type a2a"),
        ["33 splits of at least 4 token(s)", "--context-parallel-size 2", "4 at a time"],
    ),
    "a multiple of nothing": (
        shlex.split("--seq1f1b-splits 4 --seq1f1b-multiple 0"),
        ["--seq1f1b-multiple 0: must be at least 1"],
    ),
    "blocks too large for the sequence": (
        shlex.split("--seq1f1b-splits 4 --seq1f1b-multiple 64"),
        ["4 splits of at least 64 token(s)", "(--seq1f1b-multiple 64 take tokens 64 at a time)"],
    ),
    "experts under tensor parallelism alone": (
        [*_EXPERTS, "--tensor-model-parallel-size", "2"],
        ["--num-experts trains under --tensor-model-parallel-size only with --sequence-parallel"],
    ),
    "experts that drop tokens": (
        [*_EXPERTS, "--moe-expert-capacity-factor", "1.5"],
        ["--moe-expert-capacity-factor drops other tokens", "leave it out"],
    ),
    "experts balanced over steps": (
        [*_EXPERTS, "--moe-router-load-balancing-type", "global_aux_loss"],
        ["--moe-router-load-balancing-type must be of aux_loss, none, seq_aux_loss"],
    ),
    "packed documents and multi-token prediction": (
        shlex.split(
            "--seq1f1b-splits 4 --reset-attention-mask --mtp-num-layers 1 "
            "--position-embedding-type rope"
        ),
        ["--mtp-num-layers"],
    ),
    "packed documents and context parallelism": (
        shlex.split(
            "--seq1f1b-splits 4 --dataloader-inter-document-masking --context-parallel-size 2"
        ),
        ["--context-parallel-size"],
    ),
    "Mamba layers": (
        ["--seq1f1b-splits", "4", "--hybrid-layer-pattern", "M*M*"],
        ["--hybrid-layer-pattern is not supported with sub-sequences", "no recurrent state"],
    ),
    "offloaded activations": (
        [
            *("--seq1f1b-splits", "4", "--pipeline-model-parallel-size", "1"),
            *("--tensor-model-parallel-size", "2", "--cpu-offloading-num-layers", "2"),
        ],
        ["--cpu-offloading-num-layers cannot tell sub-sequences apart", "recompute instead"],
    ),
    "one layer for several predictions": (
        [*_AHEAD, "--mtp-use-repeated-layer"],
        ["--mtp-use-repeated-layer is not supported with sub-sequences"],
    ),
    "predictions before the last stage": (
        [*_AHEAD, "--pipeline-model-parallel-layout", "Et|tt|tmm|L"],
        ["--pipeline-model-parallel-layout must put multi-token prediction (m) into the last"],
    ),
    "predictions and context parallelism": (
        [*_AHEAD, "--context-parallel-size", "2", "--cp-comm-type", "a2a"],
        ["--mtp-num-layers cannot go with --context-parallel-size and sub-sequences"],
    ),
    "an attention kernel that is not there": (
        ["--seq1f1b-splits", "4", "--seq1f1b-attention", "flash-attn-2"],
        ["--seq1f1b-attention flash-attn-2 needs a package or a GPU that is not here: leave"],
    ),
    "several at once": (
        ["--seq1f1b-splits", "0", "--attention-dropout", "0.1", "--seq1f1b-schedule", "1f1b"],
        ["--seq1f1b-splits 0", "--attention-dropout must be 0"],
    ),
    "unknown balance method": (["--seq1f1b-balance-method", "best"], ["2"]),
}

ACCEPTED = {
    "plain": ([], 1, [128]),
    "four splits": (
        ["--seq1f1b-splits", "4", "--seq1f1b-balance-method", "average"],
        4,
        [32, 32, 32, 32],
    ),
    "documents told apart by their last token": (
        ["--seq1f1b-splits", "2", "--seq1f1b-balance-method", "average", "--reset-attention-mask"],
        2,
        [64, 64],
    ),
    "documents told apart by their positions": (
        shlex.split(
            "--seq1f1b-splits 2 --seq1f1b-balance-method average "
            "--reset-attention-mask --reset-position-ids --eod-mask-loss"
        ),
        2,
        [64, 64],
    ),
    "packed samples": (
        ["--seq1f1b-splits", "2", "--seq1f1b-balance-method", "average", "--sft"],
        2,
        [64, 64],
    ),
    "MindSpeed's flag": (
        ["--enable-seq1f1b", "--seq1f1b-balance-method", "average"],
        4,
        [32, 32, 32, 32],
    ),
    "multi-latent attention": (
        shlex.split(
            "--seq1f1b-splits 2 --seq1f1b-balance-method average --multi-latent-attention "
            "--position-embedding-type rope --rope-type rope"
        ),
        2,
        [64, 64],
    ),
    "MindSpeed's flag and a number": (
        ["--enable-seq1f1b", "--seq1f1b-splits", "2", "--seq1f1b-balance-method", "average"],
        2,
        [64, 64],
    ),
    "multi-token prediction": (
        [*_AHEAD, "--seq1f1b-balance-method", "average"],
        4,
        [32, 32, 32, 32],
    ),
    "context parallelism through all-to-all": (
        shlex.split(
            "--seq1f1b-splits 3 --seq1f1b-balance-method average --context-parallel-size 2 "
            "--cp-comm-type a2a --tensor-model-parallel-size 2 --sequence-parallel "
            "--pipeline-model-parallel-size 1"
        ),
        3,
        [44, 44, 40],
    ),
    "not divisible": (
        ["--seq1f1b-splits", "3", "--seq1f1b-balance-method", "average"],
        3,
        [43, 43, 42],
    ),
    "in blocks of kernels": (
        shlex.split("--seq1f1b-splits 3 --seq1f1b-multiple 16"),
        3,
        [48, 48, 32],
    ),
    "in blocks that ranks share": (
        shlex.split(
            "--seq1f1b-splits 3 --seq1f1b-balance-method average --seq1f1b-multiple 3 "
            "--seq-length 120 --max-position-embeddings 128 "
            "--tensor-model-parallel-size 2 --sequence-parallel"
        ),
        3,
        [42, 42, 36],
    ),
    "aligned to tensor parallelism": (
        shlex.split(
            "--seq1f1b-splits 3 --seq1f1b-balance-method average "
            "--tensor-model-parallel-size 2 --sequence-parallel"
        ),
        3,
        [44, 42, 42],
    ),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, list]:
    """Answers to all command lines, from one process on rank 0 of 4."""
    lines = {name: _BASE + flags for name, (flags, *_) in (REFUSED | ACCEPTED).items()}
    found = ask(_PROGRAM, list(lines.values()), RANK="0", WORLD_SIZE="4")
    return dict(zip(lines, found, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(answers, name):
    kind, message, has_process_group = answers[name]
    assert kind == "exit"
    assert not has_process_group
    for expected in REFUSED[name][1]:
        assert expected in message


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(answers, name):
    _, num_splits, lengths = ACCEPTED[name]
    assert answers[name] == ["ok", num_splits, lengths]
