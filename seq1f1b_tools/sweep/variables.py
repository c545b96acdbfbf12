"""The environment variables of the sweep: what each may be, its defaults and its help."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq1f1b.sequence import BALANCE_METHODS
from seq1f1b_tools.sweep.models import MODELS

DATASETS = ("stdlib", "codeparrot")


def _whole(text: str, lowest: int = 1) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < lowest:
        raise ValueError(f"{text!r} is not a whole number from {lowest} up")
    return int(text)


def _from_zero(text: str) -> int:
    return _whole(text, 0)


def _vocabulary(text: str) -> int:
    return _whole(text, 257)  # every byte, and the end of a document


def _port(text: str) -> int:
    if not 1024 <= _whole(text) <= 65534:
        raise ValueError(f"{text!r} is not a port from 1024 to 65534")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{text!r} is not a number above 0")
    return value


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def _switch(text: str) -> bool:
    return _one_of("0", "1")(text) == "1"


def _set_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Several values, none of them twice."""
    return lambda text: tuple(dict.fromkeys(_list_of(parse)(text)))


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse_list(text: str) -> tuple[Any, ...]:
        words = text.replace(",", " ").split()
        if not words:
            raise ValueError("there is no value in it")
        return tuple(map(parse, words))

    return parse_list


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}") from error


@dataclass(frozen=True)
class Variable:
    """An environment variable. Where it is unset or empty, the default of the device is parsed.

    parse: gives the value, or raises ValueError with what is wrong.
    computed: the defaults only describe what follows from other settings; the value is None.
    """

    name: str
    parse: Callable[[str], Any]
    cpu: str
    gpu: str
    help: str
    computed: bool = False


VARIABLES = (
    Variable("MODEL_SIZES", _set_of(_one_of(*MODELS)), "tiny", "2.7b", "of " + ", ".join(MODELS)),
    Variable("SEQ_LENGTHS", _set_of(_whole), "4096", "16384", "tokens in a sequence"),
    Variable("MICRO_BATCHES", _set_of(_whole), "2 4", "8 16", "micro-batches in a step (m)"),
    Variable("SPLITS", _set_of(_whole), "1 4", "1 4", "sub-sequences; 1 is Megatron's 1F1B"),
    Variable(
        "BALANCE_METHODS",
        _set_of(_one_of(*BALANCE_METHODS)),
        "average uniform_comp",
        "average uniform_comp",
        "how sequences are cut",
    ),
    Variable("MULTIPLE", _whole, "1", "1", "tokens that sub-sequences are cut in multiples of"),
    Variable(
        "VPP_SIZES", _set_of(_whole), "1", "1", "model chunks of a stage; from 2: interleaved"
    ),
    Variable("TP", _set_of(_whole), "1", "1", "tensor-parallel sizes"),
    Variable("PP", _set_of(_whole), "2", "8 or fewer", "numbers of stages", computed=True),
    Variable("MICRO_BATCH_SIZE", _whole, "1", "1", "sequences in a micro-batch"),
    Variable(
        "TRAIN_ITERS",
        _list_of(_whole),
        "20; 12 from m=3",
        "20",
        "steps of a run: one number, or one for each of MICRO_BATCHES",
        computed=True,
    ),
    Variable("WARMUP_ITERS", _from_zero, "2", "5", "first steps, left out of the measurements"),
    Variable(
        "TAKE_TURNS",
        _switch,
        "1 on one node",
        "0",
        "1: runs that are compared alternate step by step, all in memory; 0: one after the other",
        computed=True,
    ),
    Variable("DATASET", _one_of(*DATASETS), "stdlib", "stdlib", "of " + ", ".join(DATASETS)),
    Variable("VOCAB_SIZE", _vocabulary, "384", "50257", "tokens of the BPE that is trained on it"),
    Variable("CORPUS_MB", _number, "8", "32", "megabytes of text to take at most"),
    Variable("DATA", Path, "data", "data", "folder for the data; the default is the repository's"),
    Variable("OUTPUT", Path, "exp_logs", "exp_logs", "folder for the results, likewise"),
    Variable("EXTRA_ARGS", _words, "", "", "flags added to every run, Megatron's or ours"),
    Variable("RUN_TIMEOUT", _number, "3600", "3600", "seconds after which a run is ended"),
    Variable("RETRY_FAILED", _switch, "0", "0", "1: repeat runs that have failed before"),
    Variable("NNODES", _whole, "1", "1", "nodes; the same command runs on each"),
    Variable("NODE_RANK", _from_zero, "0", "0", "number of this node"),
    Variable("MASTER_ADDR", str, "", "", "address of node 0"),
    Variable("MASTER_PORT", _port, "29500", "29500", "a free port of node 0, and the one after it"),
    Variable(
        "GPUS_PER_NODE", _whole, "TP x PP", "all", "processes a node, on CPUs too", computed=True
    ),
)


def help_text() -> str:
    """Return what ``bash exp.sh --help`` prints."""
    rows = [("variable", "on a CPU", "on GPUs", "what it is")]
    rows += [(v.name, v.cpu or "-", v.gpu or "-", v.help) for v in VARIABLES]
    name, cpu, gpu = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(
        [
            "usage: [VARIABLE=value ...] bash exp.sh",
            "",
            "Trains a GPT on source code under 1F1B and under Seq1F1B, in every combination of the",
            "settings below, and compares speed, memory and loss. Lists take spaces or commas.",
            "A second call goes on where the first one stopped. docs/sweep.md says more.",
            "",
            *(f"{row[0]:{name}}  {row[1]:{cpu}}  {row[2]:{gpu}}  {row[3]}" for row in rows),
            "",
            "Under SLURM, NNODES, NODE_RANK and MASTER_ADDR come from it where they are not set.",
        ]
    )
