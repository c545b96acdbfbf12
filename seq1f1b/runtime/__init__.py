"""Run one rank's list of actions."""

from seq1f1b.runtime.clock import ActionClock
from seq1f1b.runtime.context import ExecutionContext
from seq1f1b.runtime.executor import ActionError, Computation, execute
from seq1f1b.runtime.memory import ActivationMeter
from seq1f1b.runtime.transport import (
    ALL_CHANNELS,
    ONE_CHUNK,
    Channel,
    LinkError,
    PointToPoint,
    StagedPointToPoint,
    Transport,
    connect,
    point_to_point,
)
from seq1f1b.runtime.weight_gradients import DeferrableLinear, WeightGradients

__all__ = [
    "ALL_CHANNELS",
    "ONE_CHUNK",
    "ActionClock",
    "ActionError",
    "ActivationMeter",
    "Channel",
    "Computation",
    "DeferrableLinear",
    "ExecutionContext",
    "LinkError",
    "PointToPoint",
    "StagedPointToPoint",
    "Transport",
    "WeightGradients",
    "connect",
    "execute",
    "point_to_point",
]
