"""What a runtime adds to the tensors of the model: description files in data/runtimes."""

from functools import cache
from typing import Literal

from seq1f1b.planner.files import Described, available, load


class Runtime(Described):
    """Switches of one runtime; the same for all models.

    kv_carry: whether keys and values of earlier sub-sequences lie in pooled buffers as long as the
    sequence, with gradient accumulators in fp32, or are concatenated anew. attention_inputs:
    whether attention keeps views of the QKV projection or copies. dropout_masks: when a mask is
    kept, and how wide it is. rotary_tables: whether each layer keeps cosines and sines of its own.
    collective_buffers: in which actions buffers of tensor-parallel collectives cannot be used
    again before the end. composed_rms_norm: whether RMSNorm keeps its normalised input too. host:
    whether memory is the host's, without a caching allocator. action_seconds: time lost on every
    action of an interleaved schedule on sub-sequences.
    """

    kv_carry: Literal["pooled", "concatenated"]
    attention_inputs: Literal["views", "copies"]
    dropout_masks: Literal["if_dropout", "always", "elements"]
    rotary_tables: Literal["by_flags", "per_layer"]
    collective_buffers: Literal["never", "forward", "always"]
    composed_rms_norm: bool = False
    host: bool = False
    action_seconds: float = 0.0


@cache
def runtime(name: str) -> Runtime:
    """Load a runtime by name; raises DataFileError for one that there is not."""
    return load(Runtime, "runtimes", name)


def runtimes() -> list[str]:
    """Return the names of all runtimes."""
    return available("runtimes")
