"""What every stage holds through a step, in two depths: a closed form, and a trace of tensors."""

from seq1f1b.planner.memory.allocator import GIB
from seq1f1b.planner.memory.closed_form import estimate_peak, estimate_stages
from seq1f1b.planner.memory.stage import StageMemory
from seq1f1b.planner.memory.trace import MemoryTrace, trace_fullest, trace_memory

__all__ = [
    "GIB",
    "MemoryTrace",
    "StageMemory",
    "estimate_peak",
    "estimate_stages",
    "trace_fullest",
    "trace_memory",
]
