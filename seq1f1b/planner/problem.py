"""The planner's input and its result."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from seq1f1b.planner.gpu import Gpu
from seq1f1b.planner.runtime import Runtime, runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time import Kernels, StepTime

HOST_RUNTIME = "cpu"


@dataclass(frozen=True)
class Problem:
    """Options that are fixed, and the cluster.

    values: fields of ``Arguments``.
    """

    values: Mapping[str, Any]
    num_gpus: int
    gpu: Gpu
    gpus_per_node: int

    @cached_property
    def runtime(self) -> Runtime:
        """The runtime whose memory and time are modelled."""
        return runtime(self.gpu.runtime)

    @cached_property
    def kernels(self) -> Kernels:
        """Times of the GPU's kernels and collectives."""
        return Kernels(self.gpu, self.gpus_per_node)

    @property
    def limit_gib(self) -> float:
        """What the allocator of one GPU can reserve."""
        return self.gpu.usable_gib.value


@dataclass(frozen=True)
class Row:
    """A setting with its simulated step, and GiB that its fullest stage reserves."""

    setting: Setting
    step: StepTime
    peak_gib: float
    fullest_stage: int


@dataclass(frozen=True)
class Plan:
    """Settings that fit, the best first.

    overfull: those that were traced and do not fit; where nothing fits, the least full first.
    num_settings: how many were looked at.
    """

    problem: Problem
    rows: tuple[Row, ...]
    overfull: tuple[Row, ...]
    num_settings: int


def with_defaults(problem: Problem) -> dict[str, Any]:
    """Return the problem's options with those that a plan chooses for everybody.

    Attention drops nothing, which sub-sequences need; optimizer states are sharded and, on GPUs,
    reductions overlapped where there are several replicas; training is in bf16 on GPUs and in fp32
    on hosts.
    """
    on_gpus = problem.gpu.runtime != HOST_RUNTIME
    chosen: dict[str, Any] = {"attention_dropout": 0.0}
    if problem.num_gpus > 1:
        chosen["use_distributed_optimizer"] = True
        if on_gpus:
            chosen |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    if "bf16" not in problem.values and "fp16" not in problem.values:
        chosen["bf16"] = on_gpus
    return chosen | dict(problem.values)
