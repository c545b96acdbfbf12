"""Rotary positions of a sub-sequence start where the one before it ended."""

from collections.abc import Callable
from typing import Any

from seq1f1b.runtime import ExecutionContext


def rotary_offset(context: ExecutionContext) -> Callable[[Callable[..., Any]], Any]:
    """Make the replacement of a rotary embedding's ``forward``, which already takes an offset."""

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, max_seq_len: int, offset: int = 0, *args: Any, **kwargs: Any) -> Any:
            return original(self, max_seq_len, offset + context.offset, *args, **kwargs)

        return forward

    return replacement
