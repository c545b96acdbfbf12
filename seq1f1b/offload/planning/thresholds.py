"""From how many tokens on copies and Adam hide behind computing, and the bubble."""

from dataclasses import dataclass

from seq1f1b.offload.planning.costs import adam_bytes
from seq1f1b.offload.planning.machine import Machine
from seq1f1b.planner.memory.parameters import layer_parameters
from seq1f1b.planner.setting import Setting


@dataclass(frozen=True)
class Thresholds:
    """Tokens of a turn from which loads hide, with the link alone and with all GPUs copying.

    adam: tokens of a step from which Adam on the host hides, if it overlaps at all.
    """

    loads: float
    loads_together: float
    adam: float


def thresholds(setting: Setting, machine: Machine) -> Thresholds:
    """Return where copies and Adam take as long as the matrix products of layers.

    A forward computes 2 operations for each weight and token, while a weight of 2 bytes is loaded:
    flops / bandwidth tokens. A step computes 6, or 8 with full recomputation, on all GPUs. With
    experts that a token does not go through, more tokens are needed by as much as they weigh.
    """
    model = setting.model
    layers = (layer_parameters(setting, experts=experts) for experts in model.expert_layers)
    weights = sum(held.dense + held.experts for held in layers)
    idle = weights / (model.token_cost(0).linear / 2)
    per_weight = idle * setting.element_bytes * machine.flops / 2
    passes = 8 if setting.recompute.granularity == "full" else 6
    update = idle * adam_bytes(setting) / machine.host
    return Thresholds(
        loads=per_weight / machine.pcie,
        loads_together=per_weight / machine.pcie_together,
        adam=update * machine.num_gpus * machine.flops / passes,
    )


def bubble(num_stages: int, num_chunks: int, num_micro_batches: int, num_splits: int) -> float:
    """Return the bubble over computing, (p - 1) / (v m s)."""
    return (num_stages - 1) / (num_chunks * num_micro_batches * num_splits)
