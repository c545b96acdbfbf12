"""Which of a test's parameters run by default, and which only with --all."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_long(values: Iterable[Any], *, default: Iterable[Any]) -> list[Any]:
    """Return parameters of which only those in ``default`` run without --all."""
    chosen = list(default)
    return [
        value if value in chosen else pytest.param(value, marks=pytest.mark.long)
        for value in values
    ]
