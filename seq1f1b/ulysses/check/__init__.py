"""Compare a model on one process with the same model on a group of ranks."""

from seq1f1b.ulysses.check.compare import Comparison, compare
from seq1f1b.ulysses.check.run import LAYOUTS, check
from seq1f1b.ulysses.check.source import Source

__all__ = ["LAYOUTS", "Comparison", "Source", "check", "compare"]
