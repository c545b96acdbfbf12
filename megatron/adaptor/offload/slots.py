"""Slots of the device that model chunks visit, and what the visits have moved."""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.adaptor.offload.link import Copied, Direction, DirectLink, Link
from megatron.adaptor.offload.reductions import Reductions
from megatron.adaptor.offload.updates import Updates
from seq1f1b.schedule import Action, Kind, Schedule, residencies


@dataclass
class Traffic:
    """Loads of one step on this stage, and bytes as the copies counted them.

    gradients_in: of chunks that come back before their gradients are complete.
    """

    loads: int = 0
    weights_in: int = 0
    gradients_in: int = 0
    gradients_out: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes both ways."""
        return self.weights_in + self.gradients_in + self.gradients_out


class _Place(NamedTuple):
    """One flat buffer's part of a slot: weights and gradients."""

    weights: Tensor
    gradients: Tensor


class ChunkSlots:
    """Slots for the model ``chunks`` of this stage, each of which is Megatron's DDP.

    The flat buffers of Megatron's distributed optimizer are the chunks' home. A slot has room for
    the largest buffer of each kind (dtypes, experts or not). ``load`` copies a chunk into its slot
    and points its parameters there; ``free`` takes gradients home and points back. Optimizer,
    reductions and checkpoints see the home only. updates: of the home, for which a load waits; they
    hear when a chunk's complete gradients leave for it. device: where the slots are. poison:
    whether freed memory is filled with NaN.

    Raises ValueError when a chunk has parameters to train outside of its buffers.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        num_slots: int,
        updates: Updates,
        reductions: Reductions,
        *,
        device: torch.device | int | str = "cpu",
        link: Link | None = None,
        poison: bool = False,
    ) -> None:
        self._chunks, self._updates, self._reductions = chunks, updates, reductions
        self._link = link or DirectLink()
        self._buffers = [[*chunk.buffers, *chunk.expert_parallel_buffers] for chunk in chunks]
        self._poison = poison
        for chunk, buffers in zip(chunks, self._buffers, strict=True):
            _check(chunk, buffers)
        self._homes = [
            {
                parameter: (parameter.data, parameter.main_grad)
                for buffer in buffers
                for parameter in buffer.params
            }
            for buffers in self._buffers
        ]
        room = _room(buffer for buffers in self._buffers for buffer in buffers)
        self._slots = [
            {
                key: _Place(
                    torch.full((size,), math.nan, dtype=key[0], device=device),
                    torch.full((size,), math.nan, dtype=key[1], device=device),
                )
                for key, size in room.items()
            }
            for _ in range(num_slots)
        ]
        self._accumulators = {p: _accumulator(p) for home in self._homes for p in home}
        self._there: dict[int, int] = {}  # slot of each chunk on the device
        self._partial: set[int] = set()
        self._arriving: dict[int, Copied] = {}  # by chunk
        self._leaving: dict[int, Copied] = {}  # by slot
        self._slot_of: Sequence[int] = ()
        self._going_backward: Mapping[Action, bool] = {}
        self._last_frees: Mapping[int, Action] = {}  # by chunk: when its gradients are complete
        self._reduces = False
        self.traffic = Traffic()

    @property
    def tensors(self) -> list[Tensor]:
        """What the slots consist of."""
        return [tensor for slot in self._slots for place in slot.values() for tensor in place]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, which are all that weights and gradients take of the device."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def begin(self, schedule: Schedule, stage: int, *, reduces: bool) -> None:
        """Begin a step of ``schedule``, whose visits these will be.

        reduces: whether the step ends with Megatron's own reduction of all gradients.

        Raises UpdateError after a step that ended between updates.
        """
        assert schedule.slots is not None, f"{schedule.name} has no slots"
        assert not self._there, f"chunks {sorted(self._there)} are still on the device"
        self._slot_of = schedule.slots[stage]
        visits = residencies(schedule.stages[stage], self._slot_of)
        self._going_backward = {visit.load: visit.goes_backward for visit in visits}
        self._last_frees = {visit.chunk: visit.free for visit in visits if visit.goes_backward}
        self._reduces = reduces
        self._updates.begin(self._chunks, trains=bool(self._last_frees))
        self._reductions.begin(self._chunks, self._updates.optimizer_of(self._chunks))
        self._partial = set()
        self.traffic = Traffic()

    def load(self, action: Action) -> None:
        """Have the chunk copied into its slot when that is free, and point its parameters there.

        Its gradients begin at 0, or where they were left.
        """
        chunk, slot = action.chunk, self._slot_of[action.chunk]
        assert slot not in self._there.values(), f"{action}: slot {slot} is taken: {self._there}"
        self._updates.settle(self._chunks[chunk])
        self._there[chunk] = slot
        self.traffic.loads += 1
        needs_gradients = self._going_backward[action]
        comes_back = needs_gradients and chunk in self._partial
        copies: list[tuple[Tensor, Tensor | None]] = []
        for buffer, place in self._places(chunk):
            copies.append((place.weights, buffer.param_data))
            self.traffic.weights_in += buffer.param_data.nbytes
            if needs_gradients:
                copies.append((place.gradients, buffer.grad_data if comes_back else None))
            if comes_back:
                self.traffic.gradients_in += buffer.grad_data.nbytes
            for parameter in buffer.params:
                start, end, _ = buffer.param_index_map[parameter]
                _point(
                    parameter,
                    place.weights[start:end].view(parameter.shape),
                    place.gradients[start:end].view(parameter.shape),
                )
                self._keep_hook(chunk, parameter)
        num_bytes = sum(source.nbytes for _, source in copies if source is not None)
        after = [self._leaving.pop(slot)] if slot in self._leaving else []
        self._arriving[chunk] = self._link.start(
            Direction.IN, num_bytes, partial(_fill, copies), after
        )

    def wait(self, action: Action) -> None:
        """Let a computation come after its chunk's load."""
        arriving = self._arriving.pop(action.chunk, None)
        if arriving is not None:
            arriving.order()

    def free(self, action: Action) -> None:
        """Point the chunk's parameters home; after backwards have its gradients taken there."""
        chunk = action.chunk
        places = list(self._places(chunk))
        slot = self._there[chunk]
        self._point_home(chunk)
        if action.kind is Kind.FREE_F:
            self._spoil(places)
            return
        astray = [p for buffer, _ in places for p in buffer.params if p.grad is not None]
        assert not astray, f"{action}: {len(astray)} gradients have not been added to main_grad"
        under_way = self._updates.are_under_way(self._chunks[chunk])
        assert not under_way, f"{action}: the update of the last step still reads gradients"
        self._partial.add(chunk)
        is_complete = self._reduces and action == self._last_frees[chunk]
        if is_complete:
            gradients = {buffer: place.gradients for buffer, place in places}
            reduce = partial(self._reductions.reduce, self._chunks[chunk], gradients)
            self._link.compute(Direction.OUT, reduce)
        num_bytes = sum(buffer.grad_data.nbytes for buffer, _ in places)
        self.traffic.gradients_out += num_bytes
        leaving = self._link.start(Direction.OUT, num_bytes, partial(self._take_home, places))
        self._leaving[slot] = leaving
        if is_complete:
            self._updates.expect(self._chunks[chunk], leaving.synchronize)

    def end(self) -> None:
        """Wait for all copies, and point home what after a step that failed is not there."""
        self._link.finish()
        copies = [*self._arriving.values(), *self._leaving.values()]
        self._arriving, self._leaving = {}, {}
        for chunk in list(self._there):
            places = list(self._places(chunk))
            self._point_home(chunk)
            self._spoil(places)
        for copied in copies:
            copied.order()

    def _take_home(self, places: Sequence[tuple[Any, _Place]]) -> None:
        for buffer, place in places:
            buffer.grad_data.copy_(place.gradients, non_blocking=True)
        self._spoil(places)

    def _keep_hook(self, chunk: int, parameter: Any) -> None:
        """Have DDP's hook, which adds gradients to ``main_grad``, on the parameter's accumulator.

        Autograd drops the accumulator, and its hooks, when a parameter's data moves to another
        device, and makes a new one, which lives on in graphs after the parameter has left again.
        """
        accumulator = _accumulator(parameter)
        if accumulator is not self._accumulators[parameter]:
            accumulator.register_hook(self._chunks[chunk]._make_backward_post_hook(parameter))
            self._accumulators[parameter] = accumulator

    def _spoil(self, places: Sequence[tuple[Any, _Place]]) -> None:
        """Let whoever still uses a slot that was given up find NaN there, if that is asked for."""
        if self._poison:
            for _, place in places:
                place.weights.fill_(math.nan)
                place.gradients.fill_(math.nan)

    def _point_home(self, chunk: int) -> None:
        for parameter, (weights, gradients) in self._homes[chunk].items():
            parameter.data, parameter.main_grad = weights, gradients
        del self._there[chunk]

    def _places(self, chunk: int) -> Iterator[tuple[Any, _Place]]:
        """Yield each flat buffer of ``chunk`` and as much of its slot as it fills."""
        slot = self._slots[self._there[chunk]]
        for buffer in self._buffers[chunk]:
            whole, number = slot[_key(buffer)], buffer.param_data.numel()
            yield buffer, _Place(whole.weights[:number], whole.gradients[:number])


def _fill(copies: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Copy into each first tensor the second, or zeros where there is none."""
    for target, source in copies:
        if source is None:
            target.zero_()
        else:
            target.copy_(source, non_blocking=True)


def _point(parameter: Any, weights: Tensor, gradients: Tensor) -> None:
    """Let a parameter's weights and gradients lie elsewhere, under the same owner."""
    owner = getattr(parameter.main_grad, "owner", None)
    if owner is not None:
        gradients.owner = owner  # type: ignore[attr-defined]
    parameter.data, parameter.main_grad = weights, gradients


@torch.enable_grad()
def _accumulator(parameter: Any) -> Any:
    """Return the node of autograd that adds up a parameter's gradient."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def _key(buffer: Any) -> tuple[torch.dtype, torch.dtype, Hashable]:
    is_shared = all(getattr(parameter, "allreduce", True) for parameter in buffer.params)
    return buffer.param_data.dtype, buffer.grad_data.dtype, is_shared


def _room(buffers: Iterable[Any]) -> dict[tuple[torch.dtype, torch.dtype, Hashable], int]:
    """Return how many elements a slot has for each kind of buffer."""
    room: dict[tuple[torch.dtype, torch.dtype, Hashable], int] = {}
    for buffer in buffers:
        key = _key(buffer)
        room[key] = max(room.get(key, 0), buffer.param_data.numel())
    return room


def _check(chunk: Any, buffers: Sequence[Any]) -> None:
    held = {parameter for buffer in buffers for parameter in buffer.params}
    outside = [
        name
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and parameter not in held
    ]
    if outside or any(buffer.param_data is None for buffer in buffers):
        raise ValueError(
            f"--offload-model-chunks: weights outside of Megatron's flat buffers cannot visit the "
            f"device: {', '.join(outside[:3]) or 'add --use-distributed-optimizer'}"
        )
