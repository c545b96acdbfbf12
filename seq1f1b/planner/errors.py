"""What the planner cannot plan."""

from collections.abc import Sequence

from seq1f1b.errors import Seq1F1BError


class SettingError(Seq1F1BError, ValueError):
    """Settings that Megatron or the planner does not take; every fault names its flag."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class CalibrationError(Seq1F1BError, RuntimeError):
    """A rank that measured did not come to its end."""


class DataFileError(Seq1F1BError, ValueError):
    """A description file that is missing or has a field that does not fit."""
