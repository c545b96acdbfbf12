"""The base of what this package raises on purpose, and what its messages share."""

from collections.abc import Iterable
from difflib import get_close_matches


class Seq1F1BError(Exception):
    """An error that Seq1F1B found and explains; the message says what to do.

    Subclasses also derive from the built-in exception of their kind, mostly ValueError.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known one nearest to it, if any."""
    near = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
