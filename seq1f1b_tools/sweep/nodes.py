"""The nodes of one sweep in step with each other: node 0 decides, the others follow."""

import contextlib
import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from seq1f1b_tools.sweep.cluster import Cluster

_POLL_SECONDS = 0.2
_SECONDS_TO_MEET = 900.0
_SECONDS_TO_ANSWER = 300.0


class NodesError(Exception):
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
            with contextlib.suppress(RuntimeError):  # node 0 has ended: nobody to tell
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
