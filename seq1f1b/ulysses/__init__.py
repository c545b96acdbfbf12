"""Sequence parallelism (Ulysses, arXiv 2309.14509) for Hugging Face models, exact or refused."""

from seq1f1b.ulysses.batch import pad_for_sequence_parallel, split_for_sequence_parallel
from seq1f1b.ulysses.dispatch import dispatch_modules
from seq1f1b.ulysses.errors import CallError, UnsupportedModelError
from seq1f1b.ulysses.labels import shift_labels
from seq1f1b.ulysses.loss import reduce_sequence_parallel_loss
from seq1f1b.ulysses.memory.subsequences import backward_in_subsequences
from seq1f1b.ulysses.mesh import (
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_parallel_group,
    get_sequence_parallel_mesh,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
    init_sequence_parallel,
)
from seq1f1b.ulysses.sampler import SequenceParallelSampler

__all__ = [
    "CallError",
    "SequenceParallelSampler",
    "UnsupportedModelError",
    "backward_in_subsequences",
    "dispatch_modules",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_mesh",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "init_sequence_parallel",
    "pad_for_sequence_parallel",
    "reduce_sequence_parallel_loss",
    "shift_labels",
    "split_for_sequence_parallel",
]
