"""The nodes of one sweep: which they are, and how they keep in step. Node 0 decides for all."""

import contextlib
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from seq1f1b.errors import Seq1F1BError

_POLL_SECONDS = 0.2
_SECONDS_TO_MEET = 900.0
_SECONDS_TO_ANSWER = 300.0


@dataclass(frozen=True)
class Cluster:
    """The nodes, and the place of this one among them.

    processes_per_node: None where it follows from each run's tensor and pipeline parallelism.
    """

    num_nodes: int
    node_rank: int
    master_addr: str
    master_port: int
    processes_per_node: int | None

    def world_size(self, model_parallel_size: int) -> int:
        """Return the number of processes of a run."""
        if self.processes_per_node is None:
            return model_parallel_size
        return self.num_nodes * self.processes_per_node


def slurm_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return NNODES, NODE_RANK and MASTER_ADDR as SLURM's variables have them, where it is there.

    Raises:
        ValueError: the nodes' names cannot be had, or several tasks run on this node.
    """
    numbers = {"SLURM_NNODES": 1, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}
    for name, default in numbers.items():
        text = environ.get(name) or str(default)
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise ValueError(
                f"{name}={text:.99}: is not a number, as SLURM sets it; unset it, or set NNODES"
            )
        numbers[name] = int(text)
    if numbers["SLURM_NNODES"] < 2:
        return {}
    if numbers["SLURM_LOCALID"] > 0:
        raise ValueError(
            f"SLURM_LOCALID={environ['SLURM_LOCALID']}: the sweep starts a node's processes "
            "itself, so start it once on each node (srun --ntasks-per-node=1)"
        )
    found = {
        "NNODES": environ["SLURM_NNODES"],
        "NODE_RANK": environ.get("SLURM_NODEID") or "0",
    }
    if environ.get("MASTER_ADDR"):
        return found
    return found | {"MASTER_ADDR": _first_host(environ.get("SLURM_JOB_NODELIST", ""))}


def _first_host(node_list: str) -> str:
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        raise ValueError(
            f"SLURM_JOB_NODELIST={node_list}: scontrol, which expands it, is not on the PATH; "
            "set MASTER_ADDR to the name of the first node"
        )
    command = [scontrol, "show", "hostnames", node_list]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    hosts = done.stdout.split()
    if done.returncode or not hosts:
        raise ValueError(
            f"SLURM_JOB_NODELIST={node_list}: scontrol cannot expand it ({done.stderr.strip()}); "
            "set MASTER_ADDR to the name of the first node"
        )
    return hosts[0]


class NodesError(Seq1F1BError):
    """The nodes cannot go on together."""


class Nodes:
    """This node among the others; with one node every method is trivial.

    What node 0 decides goes through torch's key-value store on MASTER_PORT, so that no decision
    depends on what a shared file system shows to whom and when. Runs use the port after it.
    """

    def __init__(self, cluster: Cluster, seconds_to_meet: float = _SECONDS_TO_MEET) -> None:
        self.cluster = cluster
        self.is_first = cluster.node_rank == 0
        self._store: Any = None
        if cluster.num_nodes > 1:
            self._store = self._meet(seconds_to_meet)

    def _meet(self, seconds: float) -> Any:
        from torch.distributed import TCPStore

        cluster = self.cluster
        try:
            store = TCPStore(
                cluster.master_addr,
                cluster.master_port,
                is_master=self.is_first,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise NodesError(
                f"MASTER_ADDR={cluster.master_addr} MASTER_PORT={cluster.master_port}: node "
                f"{cluster.node_rank} cannot {'listen' if self.is_first else 'reach node 0'} there "
                f"({str(error).splitlines()[0]})"
            ) from error
        store.add("here", 1)
        deadline = time.monotonic() + seconds
        while (here := store.add("here", 0)) < cluster.num_nodes:
            if time.monotonic() > deadline:
                raise NodesError(
                    f"NNODES={cluster.num_nodes}: only {here} came within {seconds:g} s; start the "
                    "same command on every node, each with its own NODE_RANK"
                )
            time.sleep(_POLL_SECONDS)
        return store

    def decide(self, key: str, make: Callable[[], str]) -> str:
        """Return what node 0's ``make`` returns, on every node."""
        if self.is_first:
            value = make()
            if self._store is not None:
                self._store.set(key, value)
            return value
        return self._wait_for(key)

    def gather(self, key: str, value: str) -> list[str]:
        """Return every node's ``value`` on node 0, by node; elsewhere only this node's.

        Raises:
            NodesError: a node has left, or has not answered in time.
        """
        if self._store is None:
            return [value]
        self._store.set(f"{key}/{self.cluster.node_rank}", value)
        if not self.is_first:
            return [value]
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        return [self._wait_for(f"{key}/{n}", deadline) for n in range(self.cluster.num_nodes)]

    def raise_alarm(self, key: str, message: str) -> None:
        """Tell the other nodes that this one could not do ``key``."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # node 0 has ended and needs no notice
                self._store.set(f"alarm/{key}", f"node {self.cluster.node_rank}: {message}")

    def leave(self, message: str) -> None:
        """Tell the other nodes that this one ends before the sweep does."""
        self.raise_alarm("all", message)

    def alarm(self, key: str) -> str | None:
        """Return what a node has raised about ``key``, or said when it left."""
        if self._store is None:
            return None
        try:
            for alarm in (f"alarm/{key}", "alarm/all"):
                if self._store.check([alarm]):
                    return self._store.get(alarm).decode()
        except RuntimeError:
            return "node 0 has ended"
        return None

    def _wait_for(self, key: str, deadline: float = math.inf) -> str:
        """Wait in small steps: a blocking get would not let an interrupt through."""
        try:
            while not self._store.check([key]):
                if self._store.check(["alarm/all"]):
                    raise NodesError(self._store.get("alarm/all").decode())
                if time.monotonic() > deadline:
                    raise NodesError(
                        f"node {key.rpartition('/')[2]} has not answered for "
                        f"{_SECONDS_TO_ANSWER:g} s; see whether it still runs"
                    )
                time.sleep(_POLL_SECONDS)
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise NodesError("node 0 has ended") from error
