"""An action in time, planned or measured."""

from typing import NamedTuple

from seq1f1b.schedule.action import Action


class Span(NamedTuple):
    """An action with its start and end, in one unit; measured ones count seconds of the step."""

    action: Action
    start: float
    end: float
