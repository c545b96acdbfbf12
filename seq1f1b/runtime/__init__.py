"""Run one rank's list of actions."""

from seq1f1b.runtime.clock import ActionClock, Timed
from seq1f1b.runtime.context import ExecutionContext
from seq1f1b.runtime.executor import ActionError, Computation, execute
from seq1f1b.runtime.memory import ActivationMeter
from seq1f1b.runtime.transport import PointToPoint, Transport

__all__ = [
    "ActionClock",
    "ActionError",
    "ActivationMeter",
    "Computation",
    "ExecutionContext",
    "PointToPoint",
    "Timed",
    "Transport",
    "execute",
]
