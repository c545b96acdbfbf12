"""One thing that a pipeline stage does, small enough to print and to parse.

``1F0.2`` is the forward of model chunk 1 on sub-sequence 2 of micro-batch 0; ``0SEND_B3.1`` sends
the input gradient of chunk 0, micro-batch 3, sub-sequence 1 to the stage before.
"""

import re
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does. A combined backward is B; I and W are its two halves."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the field's letter for the input-gradient half of a backward
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    @property
    def is_compute(self) -> bool:
        """Whether the action keeps the device busy rather than a link."""
        return self in COMPUTE_KINDS

    @property
    def is_send(self) -> bool:
        """Whether the action hands a tensor to another stage."""
        return self in (Kind.SEND_F, Kind.SEND_B)

    @property
    def is_receive(self) -> bool:
        """Whether the action takes a tensor from another stage."""
        return self in (Kind.RECV_F, Kind.RECV_B)


COMPUTE_KINDS = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})

_PATTERN = re.compile(r"(\d+)([A-Z_]+?)(\d+)\.(\d+)")


class Action(NamedTuple):
    """One action on one model chunk, micro-batch and sub-sequence, all counted from 0."""

    kind: Kind
    chunk: int
    micro_batch: int
    sub_sequence: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind}{self.micro_batch}.{self.sub_sequence}"

    def of_kind(self, kind: Kind) -> "Action":
        """Return the action of another kind on the same chunk, micro-batch and sub-sequence."""
        return self._replace(kind=kind)

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read what ``str`` wrote; raises ValueError on anything else."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None or match[2] not in Kind.__members__:
            raise ValueError(f"not an action: {text!r} (expected something like 0F3.1)")
        return cls(Kind(match[2]), int(match[1]), int(match[3]), int(match[4]))
