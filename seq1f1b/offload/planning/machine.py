"""The machine of a plan: what is assumed of GPUs, links and host memory."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from seq1f1b.planner.gpu import Gpu

GB = 1e9
"""Bytes; memory and bandwidths are given in these here."""


@dataclass(frozen=True)
class Machine:
    """Rates that a model of a step is computed with, in FLOP/s and bytes per second.

    flops: what a GPU reaches. pcie: of a GPU's link, one way. uplink: of the link that the GPUs
    under one root share, one way. per_root: GPUs under a root. crossed: whether stages are dealt to
    roots in turn, instead of neighbours to the same. host: memory bandwidth that Adam reaches on
    the host. collectives: bus bandwidth of reduce-scatter and all-gather. stages: from a stage to
    the next. gpu_memory: what Adam reaches on the GPU. usable: bytes of a GPU that tensors can
    take. buckets: bytes of ZeRO-Offload's gradient buckets on a GPU. gradient_copy: bytes for each
    parameter of the fp32 copy of the gradients that the optimizer makes on the host.
    """

    num_gpus: int
    flops: float
    gpu_memory: float
    usable: float
    pcie: float = 25 * GB
    uplink: float = 25 * GB
    per_root: int = 2
    crossed: bool = False
    host: float = 300 * GB
    collectives: float = 10 * GB
    stages: float = 10 * GB
    buckets: float = 2 * GB
    gradient_copy: int = 4

    @classmethod
    def of(cls, gpu: Gpu, num_gpus: int, *, peak_fraction: float = 0.6, **rates: Any) -> "Machine":
        """Take from a GPU's description what it says; ``rates`` are fields that replace it.

        peak_fraction: of the peak that the data sheet names, which a GPU is assumed to reach.
        """
        described = {
            "flops": gpu.bf16_tflops.value * 1e12 * peak_fraction,
            "gpu_memory": gpu.memory_gb_s.value * gpu.memory_efficiency.value * GB,
            "usable": gpu.usable_gib.value * 2**30,
            "host": gpu.host_memory_gb_s.value * GB,
        }
        return cls(num_gpus=num_gpus, **(described | rates))

    @cached_property
    def num_roots(self) -> int:
        """Roots that the GPUs hang below."""
        return -(-self.num_gpus // self.per_root)

    def root(self, stage: int) -> int:
        """Return the root above the GPU of ``stage``."""
        return stage % self.num_roots if self.crossed else stage // self.per_root

    @property
    def root_together(self) -> float:
        """Bytes per second below a root when all GPUs copy at the same time."""
        return min(self.uplink, self.pcie * min(self.per_root, self.num_gpus))

    @property
    def pcie_together(self) -> float:
        """The same for each GPU."""
        return self.root_together / min(self.per_root, self.num_gpus)
