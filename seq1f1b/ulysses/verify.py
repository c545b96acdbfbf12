"""``dispatch_modules(model, verify=True)``: the check of a small copy, on the user's own ranks."""

import copy

import torch.distributed as dist
from torch import nn

from seq1f1b.ulysses.check.batches import make_batch
from seq1f1b.ulysses.check.compare import Comparison, compare
from seq1f1b.ulysses.check.source import scales_by_length
from seq1f1b.ulysses.errors import UnsupportedModelError
from seq1f1b.ulysses.mesh import SequenceParallel
from seq1f1b.ulysses.prepare import small_model, vocabulary_of

_LAYOUTS = ("plain", "packed", "padded")


def verify(model: nn.Module, parallel: SequenceParallel) -> None:
    """Compare one process with the group on a small model of the same make.

    All ranks must call it together. Raises UnsupportedModelError on all of them when loss or a
    gradient differs, or when no small model can be built.
    """
    small = small_model(model)
    if small is None:
        raise UnsupportedModelError(
            f"verify=True needs a small model of {type(model).__name__}, and none can be built "
            f"from its configuration with the same classes of modules"
        )
    device = "cpu" if parallel.mesh is None else parallel.mesh.device_type
    small.to(device)
    batches = [
        (layout, make_batch(layout, vocabulary_of(small), num_rows=2).to(device))
        for layout in _LAYOUTS
    ]
    results = compare(
        lambda: copy.deepcopy(small),
        batches,
        parallel.size,
        packed_as_one_row=scales_by_length(small.config),
    )
    said = ["; ".join(_sentence(result) for result in results if not result.is_exact)]
    if dist.is_initialized():
        dist.broadcast_object_list(said, src=0)
    if said[0]:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not exact on {parallel.size} ranks: {said[0]}"
        )


def _sentence(result: Comparison) -> str:
    name, error = result.worst
    return (
        f"{result.layout} rows: loss differs by {result.loss_error:.1e}, the gradient of {name} by "
        f"{error:.1e}"
    )
