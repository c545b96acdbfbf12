"""How the processes of a run come to be: by themselves, by torchrun, or by srun."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from seq1f1b.errors import Seq1F1BError

LAUNCHERS = ("none", "pytorch", "slurm")
_PORT = "29500"


class LaunchError(Seq1F1BError, ValueError):
    """The environment does not describe a set of processes."""


@dataclass(frozen=True)
class Place:
    """One process among all: its rank, and the node and port where rank 0 listens."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    port: str = _PORT

    def environment(self) -> dict[str, str]:
        """Return the variables by which torch finds the other processes."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }


def torchrun_command(arguments: Sequence[str], environ: Mapping[str, str]) -> list[str] | None:
    """Return the torchrun command that NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT ask for.

    None where one process is asked for, or where torchrun runs already. Raises LaunchError.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return None
    nodes = _number(environ, "NNODES", 1)
    processes = _number(environ, "NPROC_PER_NODE", 1)
    if nodes == 1 and processes == 1:
        return None
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    if nodes == 1:
        command += [f"--master-port={environ.get('PORT') or _free_port()}"]
    else:
        for name in ("NODE_RANK", "ADDR"):
            if name not in environ:
                raise LaunchError(
                    f"NNODES={nodes} needs {name} as well: NODE_RANK is this node's number, from "
                    f"0, and ADDR the address of node 0"
                )
        command += [
            f"--nnodes={nodes}",
            f"--node-rank={_number(environ, 'NODE_RANK', 0, least=0)}",
            f"--master-addr={environ['ADDR']}",
            f"--master-port={environ.get('PORT', _PORT)}",
        ]
    return [*command, "-m", "seq1f1b.cli", *arguments]


def find_place(launcher: str, environ: Mapping[str, str]) -> Place:
    """Return this process's place by the variables that ``launcher`` sets; raises LaunchError."""
    if launcher == "slurm":
        return _slurm_place(environ)
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        if launcher == "pytorch":
            raise LaunchError(
                "--launcher pytorch expects the variables that torchrun sets (RANK, WORLD_SIZE): "
                "start with torchrun, or leave --launcher out and set NPROC_PER_NODE"
            )
        return Place(port=str(_free_port()))
    return Place(
        _number(environ, "RANK", 0, least=0),
        _number(environ, "LOCAL_RANK", 0, least=0),
        _number(environ, "WORLD_SIZE", 1),
        environ.get("MASTER_ADDR", "127.0.0.1"),
        environ.get("MASTER_PORT", _PORT),
    )


def _slurm_place(environ: Mapping[str, str]) -> Place:
    missing = [name for name in ("SLURM_PROCID", "SLURM_NTASKS") if name not in environ]
    if missing:
        raise LaunchError(
            f"--launcher slurm expects {' and '.join(missing)} in the environment: start with "
            f"srun, one task per GPU"
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
    # Another port for each job, so that two jobs on one node do not meet.
    job = _number(environ, "SLURM_JOB_ID", 0, least=0)
    return Place(
        _number(environ, "SLURM_PROCID", 0, least=0),
        _number(environ, "SLURM_LOCALID", 0, least=0),
        _number(environ, "SLURM_NTASKS", 1),
        environ.get("MASTER_ADDR") or first_host(nodes),
        environ.get("MASTER_PORT") or environ.get("PORT") or str(20000 + job % 20000),
    )


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as ``gpu[03-05,9],login1``."""
    if not nodes:
        return "127.0.0.1"
    if shutil.which("scontrol"):
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
        )
        if shown.returncode == 0 and shown.stdout.strip():
            return shown.stdout.split()[0]
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise LaunchError(f"SLURM_NODELIST {nodes!r} names no host")
    return "".join(part or "" for part in match.groups())


def init_dist(launcher: str = "pytorch", backend: str | None = None) -> Place:
    """Join the processes of this run; return this one's place.

    Safe to call when they are joined already. backend: NCCL with gloo for the CPU where there are
    GPUs, otherwise gloo. Raises LaunchError.
    """
    place = find_place(launcher, os.environ)
    os.environ.update(place.environment())
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    if not dist.is_initialized():
        usual = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend or usual, rank=place.rank, world_size=place.world_size)
    return place


def _number(environ: Mapping[str, str], name: str, default: int, *, least: int = 1) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise LaunchError(f"{name}={text} is not a whole number of at least {least}")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
