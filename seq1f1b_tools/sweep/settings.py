"""What is swept, and where: the environment variables, and the settings that they make."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from seq1f1b.errors import Seq1F1BError
from seq1f1b.sequence import BALANCE_METHODS
from seq1f1b_tools.sweep.models import MODELS
from seq1f1b_tools.sweep.nodes import Cluster, slurm_variables

ROOT = Path(__file__).resolve().parents[2]
_CPU_STAGES = 2
_AUTHORS_STAGES = 8
_CPU_ITERATIONS = 12  # so that all ends in minutes
_GPU_ITERATIONS = 20
_MOST_DIGITS = 9
_MOST_SHOWN = 200

DATASETS = ("stdlib", "codeparrot")


def _whole(text: str, lowest: int = 1) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text[:_MOST_DIGITS]) < lowest:
        raise ValueError(f"{text!r} is not a whole number from {lowest} up")
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
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


def _folder(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no such home folder ({error})") from error


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
        "12",
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
    Variable("VOCAB_SIZE", _vocabulary, "8192", "50257", "tokens of the BPE that is trained on it"),
    Variable("CORPUS_MB", _number, "8", "32", "megabytes of text to take at most"),
    Variable(
        "DATA", _folder, "data", "data", "folder for the data; the default is the repository's"
    ),
    Variable("OUTPUT", _folder, "exp_logs", "exp_logs", "folder for the results, likewise"),
    Variable("EXTRA_ARGS", _words, "", "", "flags added to every run, Megatron's or ours"),
    Variable("RUN_TIMEOUT", _number, "3600", "3600", "seconds after which a run is ended"),
    Variable("RETRY_FAILED", _switch, "0", "0", "1: repeat runs that have failed before"),
    Variable("DRY_RUN", _switch, "0", "0", "1: list the runs and their commands, and start none"),
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


class SettingsError(Seq1F1BError, ValueError):
    """Environment variables that cannot work; the message has a line for each fault."""


@dataclass(frozen=True)
class Settings:
    """The settings of a sweep; those that are tuples of values are crossed with each other.

    train_iters: empty, one number, or one for each entry of micro_batches.
    take_turns: whether runs of the same setting go step by step in turn.
    """

    has_gpu: bool
    model_sizes: tuple[str, ...]
    seq_lengths: tuple[int, ...]
    micro_batches: tuple[int, ...]
    splits: tuple[int, ...]
    balance_methods: tuple[str, ...]
    multiple: int
    vpp_sizes: tuple[int, ...]
    tp: tuple[int, ...]
    pp: tuple[int, ...]
    micro_batch_size: int
    train_iters: tuple[int, ...]
    warmup_iters: int
    take_turns: bool
    dataset: str
    vocab_size: int
    corpus_mb: float
    data: Path
    output: Path
    extra_args: tuple[str, ...]
    run_timeout: float
    retry_failed: bool
    cluster: Cluster
    dry_run: bool = False

    def iterations(self, num_micro_batches: int) -> int:
        """Return how many iterations a run with ``num_micro_batches`` a step takes."""
        if len(self.train_iters) > 1:
            return self.train_iters[self.micro_batches.index(num_micro_batches)]
        if self.train_iters:
            return self.train_iters[0]
        return _GPU_ITERATIONS if self.has_gpu else _CPU_ITERATIONS


def read_settings(environ: Mapping[str, str], num_gpus: int) -> Settings:
    """Read the variables, on a machine with ``num_gpus`` GPUs.

    Raises:
        SettingsError: some variables cannot work; the message names all of them.
    """
    given = {v.name: environ.get(v.name, "").strip() for v in VARIABLES}
    faults: list[str] = []
    if not given["NNODES"]:
        try:
            given |= {k: v for k, v in slurm_variables(environ).items() if not given[k]}
        except ValueError as error:
            faults.append(str(error))
    values: dict[str, Any] = {}
    for variable in VARIABLES:
        text = given[variable.name]
        if not text and variable.computed:
            values[variable.name] = None
            continue
        text = text or (variable.gpu if num_gpus else variable.cpu)
        try:
            values[variable.name] = variable.parse(text)
        except ValueError as error:
            faults.append(f"{variable.name}={text:.{_MOST_SHOWN}}: {error!s:.{2 * _MOST_SHOWN}}")
    faults += _contradictions(values, num_gpus)
    if faults:
        raise SettingsError("\n".join(faults))
    return _settings(values, given, num_gpus)


def misspelled(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield names in the environment that are nearly those of a variable, with that one."""
    names = [variable.name for variable in VARIABLES]
    for name in sorted(environ.keys() - set(names)):
        for near in get_close_matches(name, names, n=1, cutoff=0.85):
            yield name, near


def _contradictions(values: Mapping[str, Any], num_gpus: int) -> Iterator[str]:
    """Say what is wrong between variables that are right by themselves.

    What is not right by itself is missing in ``values`` and not looked at again.
    """
    nodes, rank = values.get("NNODES", 1), values.get("NODE_RANK", 0)
    if rank >= nodes > 1:
        yield f"NODE_RANK={rank}: with NNODES={nodes} it must be below {nodes}"
    if nodes > 1 and not values["MASTER_ADDR"]:
        yield f"MASTER_ADDR: must be set to the address of node 0 with NNODES={nodes}"
    if nodes > 1 and values.get("TAKE_TURNS"):
        yield f"TAKE_TURNS=1: runs of several nodes cannot; leave it out with NNODES={nodes}"
    wanted = values.get("GPUS_PER_NODE")
    if num_gpus and wanted and wanted > num_gpus:
        yield f"GPUS_PER_NODE={wanted}: this node has {num_gpus}"
    iterations, micro_batches = values.get("TRAIN_ITERS") or (), values.get("MICRO_BATCHES", ())
    if micro_batches and len(iterations) not in (0, 1, len(micro_batches)):
        yield (
            f"TRAIN_ITERS={' '.join(map(str, iterations))}: give one number, or "
            f"{len(micro_batches)} of them, one for each of MICRO_BATCHES"
        )
    fewest = min(iterations, default=_GPU_ITERATIONS if num_gpus else _CPU_ITERATIONS)
    if values.get("WARMUP_ITERS", 0) >= fewest:
        yield (
            f"WARMUP_ITERS={values['WARMUP_ITERS']}: must be below TRAIN_ITERS ({fewest}), or "
            "nothing is left to measure"
        )


def _settings(values: dict[str, Any], given: dict[str, str], num_gpus: int) -> Settings:
    processes = values["GPUS_PER_NODE"] or num_gpus or None
    settings: dict[str, Any] = {
        field: values.get(field.upper()) for field in Settings.__annotations__
    }
    for name in ("data", "output"):
        # defaults are in the repository, folders that are given relative to the current one
        base = Path.cwd() if given[name.upper()] else ROOT
        settings[name] = base / settings[name]
    if settings["take_turns"] is None:
        settings["take_turns"] = num_gpus == 0 and values["NNODES"] == 1
    return Settings(
        **settings
        | {
            "has_gpu": num_gpus > 0,
            "pp": values["PP"] or (default_stages(values["NNODES"] * num_gpus),),
            "train_iters": values["TRAIN_ITERS"] or (),
            "cluster": Cluster(
                num_nodes=values["NNODES"],
                node_rank=values["NODE_RANK"],
                master_addr=values["MASTER_ADDR"],
                master_port=values["MASTER_PORT"],
                processes_per_node=processes,
            ),
        }
    )


def default_stages(num_gpus: int) -> int:
    """Return 8 stages as in the authors' runs, or fewer where 8 does not divide the GPUs."""
    if num_gpus == 0:
        return _CPU_STAGES
    return next(n for n in (_AUTHORS_STAGES, 4, 2, 1) if num_gpus % n == 0)
