"""What the planner cannot plan."""

from collections.abc import Sequence


class SettingError(ValueError):
    """Settings that Megatron or the planner does not take; every fault names its flag."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class DataFileError(ValueError):
    """A description file that is missing or has a field that does not fit."""
