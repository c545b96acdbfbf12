"""Measures this machine's kernels and links for the planner."""

from seq1f1b.planner.calibrate.machine import calibrate, default_ranks, write

__all__ = ["calibrate", "default_ranks", "write"]
