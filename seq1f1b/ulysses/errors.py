"""What is raised where a model or a call cannot be exact."""


class UnsupportedModelError(NotImplementedError):
    """The model mixes tokens, or uses positions, in a way that no door here covers."""


class CallError(ValueError):
    """A dispatched model was called with arguments that do not fit its group."""
