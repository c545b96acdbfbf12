"""Who computes what, when: pipeline schedules as data."""

from seq1f1b.schedule.action import Action, Kind
from seq1f1b.schedule.generators import forward_only, gpipe, interleaved, one_f_one_b, zb_h1
from seq1f1b.schedule.lower import lower
from seq1f1b.schedule.plan import Plan, PlanError
from seq1f1b.schedule.residency import num_loads, residencies, visiting
from seq1f1b.schedule.schedule import Schedule
from seq1f1b.schedule.span import Span
from seq1f1b.schedule.validate import ScheduleError, peak_live, validate

__all__ = [
    "Action",
    "Kind",
    "Plan",
    "PlanError",
    "Schedule",
    "ScheduleError",
    "Span",
    "forward_only",
    "gpipe",
    "interleaved",
    "lower",
    "num_loads",
    "one_f_one_b",
    "peak_live",
    "residencies",
    "validate",
    "visiting",
    "zb_h1",
]
