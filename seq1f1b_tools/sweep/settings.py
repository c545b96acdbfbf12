"""What is swept, and where, as read from the environment."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seq1f1b_tools.sweep.cluster import Cluster, slurm_variables
from seq1f1b_tools.sweep.variables import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
_CPU_STAGES = 2
_AUTHORS_STAGES = 8
_CPU_ITERATIONS = 20
_CPU_ITERATIONS_OF_LONG_STEPS = 12  # from 3 micro-batches on, so that all ends in minutes
_GPU_ITERATIONS = 20


class SettingsError(ValueError):
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

    def iterations(self, num_micro_batches: int) -> int:
        """Return how many iterations a run with ``num_micro_batches`` a step takes.

        The default on a CPU is fewer where a step is longer, so that no run takes much longer.
        """
        if len(self.train_iters) > 1:
            return self.train_iters[self.micro_batches.index(num_micro_batches)]
        if self.train_iters:
            return self.train_iters[0]
        if self.has_gpu:
            return _GPU_ITERATIONS
        return _CPU_ITERATIONS if num_micro_batches < 3 else _CPU_ITERATIONS_OF_LONG_STEPS


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
            faults.append(f"{variable.name}={text}: {error}")
    faults += _contradictions(values, num_gpus)
    if faults:
        raise SettingsError("\n".join(faults))
    return _settings(values, given, num_gpus)


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
    fewest = min(iterations, default=_GPU_ITERATIONS if num_gpus else _CPU_ITERATIONS_OF_LONG_STEPS)
    if values.get("WARMUP_ITERS", 0) >= fewest:
        yield (
            f"WARMUP_ITERS={values['WARMUP_ITERS']}: must be below TRAIN_ITERS ({fewest}), or "
            "nothing is left to measure"
        )


def _settings(values: dict[str, Any], given: dict[str, str], num_gpus: int) -> Settings:
    processes = values["GPUS_PER_NODE"] or num_gpus or None
    names = ("data", "output")
    folders = {n: _folder(values[n.upper()], is_default=not given[n.upper()]) for n in names}
    world_size = values["NNODES"] * num_gpus
    take_turns = values["TAKE_TURNS"]
    if take_turns is None:
        take_turns = num_gpus == 0 and values["NNODES"] == 1
    return Settings(
        has_gpu=num_gpus > 0,
        pp=values["PP"] or (default_stages(world_size),),
        train_iters=values["TRAIN_ITERS"] or (),
        take_turns=take_turns,
        cluster=Cluster(
            num_nodes=values["NNODES"],
            node_rank=values["NODE_RANK"],
            master_addr=values["MASTER_ADDR"],
            master_port=values["MASTER_PORT"],
            processes_per_node=processes,
        ),
        **folders,
        **{
            field: values[field.upper()]
            for field in Settings.__annotations__
            if field not in ("has_gpu", "pp", "train_iters", "take_turns", "cluster", *names)
        },
    )


def default_stages(num_gpus: int) -> int:
    """Return 8 stages as in the authors' runs, or fewer where 8 does not divide the GPUs."""
    if num_gpus == 0:
        return _CPU_STAGES
    return next(n for n in (_AUTHORS_STAGES, 4, 2, 1) if num_gpus % n == 0)


def _folder(path: Path, *, is_default: bool) -> Path:
    """Defaults lie in the repository, what is given is relative to the current folder."""
    return (ROOT / path if is_default else path.expanduser()).absolute()
