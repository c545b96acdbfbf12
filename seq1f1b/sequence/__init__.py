"""How the sequence of one micro-batch is cut into sub-sequences."""

from seq1f1b.sequence.documents import Documents
from seq1f1b.sequence.flops import LatentAttention, PackedCost, TokenCost
from seq1f1b.sequence.partition import (
    BALANCE_METHODS,
    PartitionError,
    imbalance,
    partition,
)
from seq1f1b.sequence.sub_sequence import SubSequence, sub_sequences

__all__ = [
    "BALANCE_METHODS",
    "Documents",
    "LatentAttention",
    "PackedCost",
    "PartitionError",
    "SubSequence",
    "TokenCost",
    "imbalance",
    "partition",
    "sub_sequences",
]
