"""Causal attention of one sub-sequence over itself and all sub-sequences before it."""

from seq1f1b.attention.carry import CarryPool, LayerCarry
from seq1f1b.attention.kernels import Kernel, choose_kernel
from seq1f1b.attention.packed import packed_attention
from seq1f1b.attention.prefix_causal import causal_attention

__all__ = [
    "CarryPool",
    "Kernel",
    "LayerCarry",
    "causal_attention",
    "choose_kernel",
    "packed_attention",
]
