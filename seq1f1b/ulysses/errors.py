"""What is raised where a model or a call cannot be exact."""

from seq1f1b.errors import Seq1F1BError


class UnsupportedModelError(Seq1F1BError, NotImplementedError):
    """The model mixes tokens, or uses positions, in a way that no door here covers."""


class CallError(Seq1F1BError, ValueError):
    """A dispatched model was called with arguments that do not fit its group."""
