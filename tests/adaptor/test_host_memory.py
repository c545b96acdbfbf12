"""A model that a machine's memory cannot keep is refused, with numbers, before ranks meet."""

import shlex
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ask

# Reads files that stand for those of control groups, and answers with the room in the groups;
# then [flags, GiB that are available, environment], and answers with how the command line ended.
_PROGRAM = """
import json, os, sys
from pathlib import Path
from megatron.adaptor import install
install()
import torch
from megatron.adaptor.command_line import refusals
from megatron.adaptor.cpu import device
from megatron.adaptor.offload import host_memory
from megatron.training.arguments import validate_args
from tests.programs import parse_args
refusals._PATIENCE = 0.0
files, cases = json.loads(sys.stdin.read())
left = [list(host_memory.left_in_groups(*map(Path, pair))) for pair in files]
answers = []
for argv, gib, environ in cases:
    os.environ.update(environ)
    device.has_gpu = lambda: "GPU" in environ
    host_memory.available_bytes = lambda: gib * 2**30
    sys.argv = ["script", *argv]
    try:
        validate_args(parse_args())
        answers.append("ok")
    except SystemExit as error:
        answers.append([error.code, torch.distributed.is_initialized()])
print("ANSWER" + json.dumps([left, answers]))
"""
_LLAMA_2_7B = shlex.split(
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --swiglu "
    "--disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --seq-length 128 --max-position-embeddings 128 --bf16 "
    "--micro-batch-size 1 --global-batch-size 6 --train-iters 4 --attention-dropout 0 "
    "--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2 "
    "--use-distributed-optimizer"
)
_OFFLOAD = [*_LLAMA_2_7B, "--offload-model-chunks", "1"]
_VOCABULARY = ["--padded-vocab-size", "32000"]
_PARAMETERS, _TABLE = 6.738e9, 32000 * 4096  # as published; the embedding, and the output layer
_LAYERS = (_PARAMETERS - 2 * _TABLE) / 32
# 4 ranks on this machine: weights in 2 bytes, gradients in 4 and Adam in 12; and for each rank a
# slot for its largest chunk, which has 4 layers and on the first and last stage a table.
_GIB = (18 * _PARAMETERS + (2 + 4) * (4 * 4 * _LAYERS + 2 * _TABLE)) / 2**30
_GIB_IN_BF16 = (20 * _PARAMETERS + (2 + 2) * (4 * 4 * _LAYERS + 2 * _TABLE)) / 2**30

# Beside a GPU slots are not the host's, and each buffer has a power of two; see powers().
_STATES = 12 * _PARAMETERS


def powers(width: int) -> float:
    """Return the bytes of 8 chunks' buffers of ``width`` bytes an element, in pinned memory."""
    plain, with_table = (2 ** ceil(log2(width * n)) for n in (4 * _LAYERS, 4 * _LAYERS + _TABLE))
    return 6 * plain + 2 * with_table


_GIB_PINNED = (_STATES + powers(2) + powers(4)) / 2**30


def on(local: int, rank: int = 0, world: int = 4) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(local),
    }


CASES: dict[str, tuple[list[str], float, dict[str, str]]] = {
    "resident": (_LLAMA_2_7B + _VOCABULARY, 1, on(4)),
    "enough": (_OFFLOAD + _VOCABULARY, _GIB * 1.01, on(4)),
    "too little": (_OFFLOAD + _VOCABULARY, _GIB * 0.99, on(4)),
    "too little, as another rank sees it": (_OFFLOAD + _VOCABULARY, _GIB * 0.99, on(4, 3)),
    "gradients in bf16": (
        [*_OFFLOAD, *_VOCABULARY, "--grad-reduce-in-bf16"],
        _GIB_IN_BF16 * 0.99,
        on(4),
    ),
    "too little for pinned memory": (
        _OFFLOAD + _VOCABULARY,
        _GIB_PINNED * 0.99,
        on(4) | {"GPU": "1"},
    ),
    "enough for pinned memory": (_OFFLOAD + _VOCABULARY, _GIB_PINNED * 1.01, on(4) | {"GPU": "1"}),
    "enough on one of two machines": (_OFFLOAD + _VOCABULARY, _GIB * 0.51, on(2)),
    "too little on the second machine": (_OFFLOAD + _VOCABULARY, _GIB * 0.49, on(2, 2)),
    "two replicas": (_OFFLOAD + _VOCABULARY, 2 * _GIB * 0.8, on(8, world=8)),
    "a vocabulary that is not known yet": (
        _OFFLOAD,
        (18 + 6 / 2) * 32 * _LAYERS / 2**30 * 1.001,
        on(4),
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Any:
    files = groups(tmp_path_factory.mktemp("groups"))
    return ask(_PROGRAM, [files, list(CASES.values())])


@pytest.fixture(scope="module")
def answers(found) -> dict[str, Any]:
    return dict(zip(CASES, found[1], strict=True))


def groups(folder: Path) -> list[list[str]]:
    """Write what version 2, version 1 and no control group at all look like."""
    two, one = folder / "two", folder / "one"
    (two / "job" / "rank").mkdir(parents=True)
    (one / "memory" / "job").mkdir(parents=True)
    for group, limit, used in ((two / "job", "1000", 300), (two / "job" / "rank", "max", 200)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 100\ninactive_file 50\nactive_file 7\n")
    (one / "memory" / "job" / "memory.limit_in_bytes").write_text("500\n")
    (one / "memory" / "job" / "memory.usage_in_bytes").write_text("400\n")
    (one / "memory" / "job" / "memory.stat").write_text("cache 90\ntotal_inactive_file 30\n")
    (folder / "of two").write_text("0::/job/rank\n")
    (folder / "of one").write_text("5:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    pairs = ((two, "of two"), (one, "of one"), (two, "no file"))
    return [[str(mounted), str(folder / name)] for mounted, name in pairs]


@pytest.mark.parametrize(
    "name",
    [
        "resident",
        "enough",
        "enough for pinned memory",
        "enough on one of two machines",
        "two replicas",  # which share the optimizer's states
        "a vocabulary that is not known yet",
    ],
)
def test_a_model_that_fits_is_accepted(answers, name):
    assert answers[name] == "ok"


@pytest.mark.parametrize(
    "name, ranks, needed",
    [
        ("too little", 4, _GIB),
        ("gradients in bf16", 4, _GIB_IN_BF16),
        ("too little for pinned memory", 4, _GIB_PINNED),
        ("too little on the second machine", 2, _GIB / 2),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_each_machine(answers, name, ranks, needed):
    message, has_process_group = answers[name]
    assert not has_process_group
    available = CASES[name][1]
    assert "--offload-model-chunks 1: weights, gradients and optimizer" in message
    assert f"of the {ranks} rank(s) on this machine take at least {needed:.3g} GiB" in message
    assert f"{available:.3g} GiB are available: use more machines" in message


def test_one_rank_of_a_machine_speaks(answers):
    assert answers["too little, as another rank sees it"] == [2, False]


def test_limits_of_control_groups_count(found):
    """Those above the own group too; files that are only cached do not."""
    assert found[0] == [[1000 - 300 + 50], [500 - 400 + 30], []]
