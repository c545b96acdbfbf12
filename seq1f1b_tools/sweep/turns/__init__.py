"""Runs that are compared take turns, a step each, so that all of them see the same machine.

A shared machine is faster in one minute than in the next, by more than schedules differ. Runs that
follow each other are then compared by chance; steps that alternate are not. ``Turns`` grants the
steps in the sweep's process; each run asks for them through ``rank.py``, which stands between
torchrun and the training script.
"""

from pathlib import Path

from seq1f1b_tools.sweep.turns.conductor import Turns

RANK_SCRIPT = Path(__file__).with_name("rank.py")

__all__ = ["RANK_SCRIPT", "Turns"]
