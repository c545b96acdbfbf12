"""Sub-sequences in time: Seq1F1B's own idea (arXiv 2406.03488) on one process group.

A row is cut into sub-sequences. Their forward passes run one after the other and keep keys and
values only. Then, from the last to the first, each runs again with a graph and at once backward,
with the gradients that later ones have for its keys and values. So activations of one sub-sequence
are alive at a time, for one more forward pass, as with recomputation.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seq1f1b.sequence import partition, sub_sequences
from seq1f1b.ulysses.batch import fingerprint, pad_for_sequence_parallel
from seq1f1b.ulysses.call import agree
from seq1f1b.ulysses.dispatched import Dispatch, dispatch_of
from seq1f1b.ulysses.errors import CallError
from seq1f1b.ulysses.labels import IGNORED, expand_rows, shift_labels, unmark
from seq1f1b.ulysses.memory.carry import Carry
from seq1f1b.ulysses.rows import Rows
from seq1f1b.ulysses.run import Run


def backward_in_subsequences(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    subsequences: int,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
) -> Tensor:
    """Do the forward and backward pass of whole rows, and return the mean loss of the group.

    model: dispatched. The other tensors are whole rows ``[b, s]`` as ``pad_for_sequence_parallel``
    takes them, the same on all ranks of the group, with labels as Hugging Face has them. backward
    is called once for each sub-sequence, with a loss whose gradients, averaged over all ranks,
    add up to those of one process; the returned loss has none.

    Raises UnsupportedModelError for models with states that run through the sequence, CallError
    and PartitionError for rows that do not fit.
    """
    dispatch = dispatch_of(model)
    rows = _WholeRows(dispatch, input_ids, labels, position_ids, attention_mask)
    lengths = partition(rows.length, subsequences, multiple=dispatch.parallel.size)
    carry = Carry(rows.length)
    parts = [slice(part.start, part.stop) for part in sub_sequences(lengths)]
    total = torch.zeros((), dtype=torch.float64, device=input_ids.device)
    states = []
    with torch.no_grad():
        for part in parts[:-1]:
            states.append(_random_state(input_ids.device))
            total += rows.loss(model, part, carry).double()
    for part in reversed(parts):
        with torch.random.fork_rng(_devices(input_ids.device), enabled=part is not parts[-1]):
            if part is not parts[-1]:
                _set_random_state(input_ids.device, states.pop())
            loss = rows.loss(model, part, carry)
            backward(loss * dispatch.parallel.size)
        if part is parts[-1]:
            total += loss.detach().double()
    if dispatch.parallel.group is not None:
        dist.all_reduce(total, group=dispatch.parallel.group)
    return total.to(torch.float32)


class _WholeRows:
    """Rows, padded and checked, of which parts are shared out over the ranks."""

    def __init__(
        self,
        dispatch: Dispatch,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> None:
        self._dispatch = dispatch
        given = input_ids, labels, position_ids, attention_mask
        input_ids, labels, position_ids, attention_mask = pad_for_sequence_parallel(*given)
        if position_ids is None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = expand_rows(places, input_ids.shape, "position_ids")
        targets = unmark(shift_labels(labels, position_ids))
        mark = int(fingerprint(input_ids, targets))
        agree(dispatch.parallel, input_ids.device, {"rows of tokens": mark})
        self._ids, self._positions, self._targets = input_ids, position_ids, targets
        self._mask = attention_mask
        self._rows = Rows.read(position_ids, attention_mask)
        self._num_items = int((targets != IGNORED).sum())
        if self._rows.is_real is not None:
            padded = ~self._rows.is_real.to(targets.device)
            if bool((padded & (targets != IGNORED)).any()):
                raise CallError("a token that is padding by attention_mask has a target")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self._ids.shape[1]

    def loss(self, model: nn.Module, part: slice, carry: Carry) -> Tensor:
        """Return the shard's share of the loss of one sub-sequence."""
        dispatch = self._dispatch
        run: Run = dispatch.make_run(self._rows, part=part, carry=carry)
        run.num_items = max(self._num_items, 1)
        run.targets = self._targets[:, run.own]
        arguments = {
            "input_ids": self._ids[:, run.own],
            "position_ids": self._positions[:, run.own],
            "attention_mask": torch.ones_like(run.targets),
            "use_cache": False,
        }
        with run.active():
            output = model(**{k: x for k, x in arguments.items() if dispatch.signature.accepts(k)})
        loss: Tensor = output.loss
        return loss


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the generators' states, so that dropout falls alike when a part runs again."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _devices(device))]


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for each, state in zip(_devices(device), states[1:], strict=True):
        torch.cuda.set_rng_state(state, each)
