"""One thing that a pipeline stage does, small enough to print and to parse.

``1F0.2`` is the forward of model chunk 1 on sub-sequence 2 of micro-batch 0; ``0SEND_B3.1`` sends
the input gradient of chunk 0, micro-batch 3, sub-sequence 1 to the stage before.
"""

import re
from enum import StrEnum
from typing import NamedTuple


class Does(StrEnum):
    """What an action is for: it keeps the device or a link busy, or owns a place on the device."""

    COMPUTE = "compute"
    SEND = "send"
    RECEIVE = "receive"
    LOAD = "load"
    FREE = "free"


class Kind(StrEnum):
    """What an action does. A combined backward is B; I and W are its two halves.

    LOAD brings a model chunk's weights to the device before the F or B that first needs them. FREE
    gives their place up; FREE_B, where gradients were computed, takes those out first.
    """

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the field's letter for the input-gradient half of a backward
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    LOAD_F = "LOAD_F"
    LOAD_B = "LOAD_B"
    FREE_F = "FREE_F"
    FREE_B = "FREE_B"

    @property
    def does(self) -> Does:
        """What the action is for."""
        return _DOES[self]

    @property
    def is_compute(self) -> bool:
        """Whether the action keeps the device busy rather than a link."""
        return self.does is Does.COMPUTE

    @property
    def is_send(self) -> bool:
        """Whether the action hands a tensor to another stage."""
        return self.does is Does.SEND

    @property
    def is_receive(self) -> bool:
        """Whether the action takes a tensor from another stage."""
        return self.does is Does.RECEIVE

    @property
    def is_load(self) -> bool:
        """Whether the action brings a model chunk to the device."""
        return self.does is Does.LOAD

    @property
    def is_free(self) -> bool:
        """Whether the action gives up a model chunk's place on the device."""
        return self.does is Does.FREE

    @property
    def is_backward(self) -> bool:
        """Whether the action computes gradients, all of them or a half."""
        return self in _BACKWARD


_DOES = {
    Kind.F: Does.COMPUTE,
    Kind.B: Does.COMPUTE,
    Kind.I: Does.COMPUTE,
    Kind.W: Does.COMPUTE,
    Kind.SEND_F: Does.SEND,
    Kind.RECV_F: Does.RECEIVE,
    Kind.SEND_B: Does.SEND,
    Kind.RECV_B: Does.RECEIVE,
    Kind.LOAD_F: Does.LOAD,
    Kind.LOAD_B: Does.LOAD,
    Kind.FREE_F: Does.FREE,
    Kind.FREE_B: Does.FREE,
}
_BACKWARD = frozenset({Kind.B, Kind.I, Kind.W})

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
