"""Which machines a sweep runs on."""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass


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
    if int(environ.get("SLURM_NNODES") or 1) < 2:
        return {}
    if int(environ.get("SLURM_LOCALID") or 0) > 0:
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
