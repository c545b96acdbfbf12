"""The groups of ranks: data parallel x sequence parallel, consecutive ranks in one sequence."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks of its sequence-parallel group."""

    bytes_sent: int = 0
    num_exchanges: int = 0


@dataclass(frozen=True)
class SequenceParallel:
    """Where this rank stands: ``size`` ranks share a sequence, ``data_size`` groups share a batch.

    mesh: the DeviceMesh with dimensions "dp" and "sp"; None when there is one process.
    group, data_group: None when there is one process, like ``mesh``.
    """

    size: int = 1
    rank: int = 0
    data_size: int = 1
    data_rank: int = 0
    mesh: DeviceMesh | None = None
    group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def __deepcopy__(self, memo: object) -> "SequenceParallel":
        """Groups of processes have no copies: a copied model talks over the same ones."""
        return self


ALONE = SequenceParallel()
_made: list[tuple[object, SequenceParallel]] = []
_current: list[SequenceParallel] = []


def init_sequence_parallel(sequence_parallel_size: int = 1) -> SequenceParallel:
    """Let every ``sequence_parallel_size`` consecutive ranks share one sequence.

    Call it on every rank after ``torch.distributed.init_process_group``; one process without a
    process group may ask for size 1. A later call with another size replaces the groups.
    Raises ValueError when the ranks cannot be divided so, and RuntimeError without a process group.
    """
    size = sequence_parallel_size
    if type(size) is not int or size < 1:
        raise ValueError(f"sequence_parallel_size must be a positive integer, not {size!r}")
    if not dist.is_initialized():
        if size > 1:
            raise RuntimeError(
                f"init_sequence_parallel({size}) needs {size} or more processes: start them with "
                f"torchrun and call torch.distributed.init_process_group() first"
            )
        _current[:] = [ALONE]
        return ALONE
    world_size = dist.get_world_size()
    if world_size % size:
        raise ValueError(
            f"sequence_parallel_size {size} does not divide the {world_size} ranks: "
            f"start a multiple of {size}, or choose a divisor of {world_size}"
        )
    world = dist.group.WORLD
    found = next((made for of, made in _made if of is world and made.size == size), None)
    if found is None:
        found = _make(world_size, size)
        _made.append((world, found))
    _current[:] = [found]
    return found


def _make(world_size: int, size: int) -> SequenceParallel:
    device = "cuda" if "nccl" in dist.get_backend() and torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (world_size // size, size), mesh_dim_names=("dp", "sp"))
    return SequenceParallel(
        size=size,
        rank=mesh.get_local_rank("sp"),
        data_size=world_size // size,
        data_rank=mesh.get_local_rank("dp"),
        mesh=mesh,
        group=mesh.get_group("sp"),
        data_group=mesh.get_group("dp"),
    )


def sequence_parallel() -> SequenceParallel:
    """Return what ``init_sequence_parallel`` set up.

    A single process needs no call. Raises RuntimeError where several processes run without one:
    each of them would silently train on a whole sequence of its own.
    """
    if _current:
        return _current[0]
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            "sequence parallelism is not set up: call init_sequence_parallel(size) on every rank "
            "before the model or the data is touched (size 1 turns it off)"
        )
    return ALONE


def get_sequence_parallel_group() -> ProcessGroup | None:
    """Return the group of ranks that share this rank's sequence."""
    return sequence_parallel().group


def get_sequence_parallel_world_size() -> int:
    """Return how many ranks share a sequence; 1 before ``init_sequence_parallel``."""
    return _current[0].size if _current else 1


def get_sequence_parallel_rank() -> int:
    """Return this rank's place in its sequence; 0 before ``init_sequence_parallel``."""
    return _current[0].rank if _current else 0


def get_data_parallel_group() -> ProcessGroup | None:
    """Return the ranks that hold the same part of other sequences."""
    return sequence_parallel().data_group


def get_data_parallel_world_size() -> int:
    """Return how many sequences are trained on at a time."""
    return sequence_parallel().data_size


def get_data_parallel_rank() -> int:
    """Return the number of this rank's sequence."""
    return sequence_parallel().data_rank


def get_sequence_parallel_mesh() -> DeviceMesh | None:
    """Return the mesh with dimensions "dp" and "sp", as FSDP2 takes it."""
    return sequence_parallel().mesh
