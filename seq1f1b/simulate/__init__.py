"""What a schedule costs before it runs."""

from seq1f1b.simulate.costs import CostError, Costs, CostsByMicroBatch, HostLink, Link
from seq1f1b.simulate.greedy import greedy
from seq1f1b.simulate.memory import Memory, memory_over_time, peak_memory
from seq1f1b.simulate.simulator import Simulation, simulate
from seq1f1b.simulate.visits import copied_bytes

__all__ = [
    "CostError",
    "Costs",
    "CostsByMicroBatch",
    "HostLink",
    "Link",
    "Memory",
    "Simulation",
    "copied_bytes",
    "greedy",
    "memory_over_time",
    "peak_memory",
    "simulate",
]
