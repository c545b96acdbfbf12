"""How long actions and steps take, from measured curves of a device's kernels."""

from seq1f1b.planner.time.accuracy import ACCURACY
from seq1f1b.planner.time.actions import action_costs, stage_link
from seq1f1b.planner.time.kernels import Kernels
from seq1f1b.planner.time.step import (
    StepTime,
    make_schedule,
    num_actions,
    quick_seconds,
    step_time,
)

__all__ = [
    "ACCURACY",
    "Kernels",
    "StepTime",
    "action_costs",
    "make_schedule",
    "num_actions",
    "quick_seconds",
    "stage_link",
    "step_time",
]
