"""The base of what this package raises on purpose."""


class Seq1F1BError(Exception):
    """An error that Seq1F1B found and explains; the message says what to do.

    Subclasses also derive from the built-in exception of their kind, mostly ValueError.
    """
