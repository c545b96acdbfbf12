"""Exact count of the activations that autograd keeps alive on the CPU, and the CUDA equivalent."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from seq1f1b.attention import CarryPool
from seq1f1b.runtime.weight_gradients import WeightGradients


class ActivationMeter:
    """Peak bytes of activations over a step: what autograd saved, the KV carry, deferred work.

    On the CPU every storage that the graph holds is counted once, from the moment it is saved to
    the moment it is freed; ``constants`` (parameters and buffers) do not count. On CUDA it is the
    allocator's peak above what was allocated when the step began.

    While it measures, it owns autograd's hooks for saved tensors: hooks that code inside opens run
    as ever, and what they make of a tensor is counted in its place.
    """

    def __init__(
        self, carries: CarryPool, weight_gradients: WeightGradients, *, device: str = "cpu"
    ) -> None:
        self._carries = carries
        self._weight_gradients = weight_gradients
        self._on_cuda = device == "cuda"
        self._held: dict[int, _Storage] = {}
        self._constants: frozenset[int] = frozenset()
        self._at_rest = 0
        self.live_bytes = 0
        self.peak_bytes = 0

    @contextmanager
    def measuring(self, constants: Iterable[Tensor]) -> Iterator[None]:
        """Measure what runs inside, from a peak of 0; what is alive already does not count."""
        self.peak_bytes = 0
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._at_rest = torch.cuda.memory_allocated()
            yield
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._at_rest
            return
        self._at_rest = self.live_bytes
        self._constants = frozenset(_identity(constant) for constant in constants)
        self._carries.on_take = self._update_peak
        self._weight_gradients.on_defer = self._update_peak
        try:
            with _hooks_owned_by(self._pack), saved_tensors_hooks(lambda x: x, lambda x: x):
                yield
        finally:
            self._carries.on_take = self._weight_gradients.on_defer = None

    def recount(self) -> None:
        """Look at the sizes of all storages again: some were emptied, or filled again, in place."""
        for held in self._held.values():
            now = held.storage.nbytes()
            self.live_bytes += now - held.num_bytes
            held.num_bytes = now
        self._update_peak()

    def _pack(self, packed: Any) -> Any:
        """Count the tensors in what a hook has made of a saved tensor."""
        if isinstance(packed, Tensor):  # nearly always, and trees are slow to walk
            return self._hold(packed)
        return pytree.tree_map_only(Tensor, self._hold, packed)

    def _hold(self, tensor: Tensor) -> "Tensor | _Saved":
        if not tensor.is_cpu:
            return tensor
        identity = _identity(tensor)
        if identity in self._constants:
            return tensor
        held = self._held.get(identity)
        if held is None:
            storage = tensor.untyped_storage()
            held = self._held[identity] = _Storage(storage, storage.nbytes())
            self.live_bytes += held.num_bytes
            self._update_peak()
        held.num_holders += 1
        # An output that its own node keeps would keep the graph, if no backward runs.
        return _Saved(self, tensor.detach(), identity)

    def _drop(self, identity: int) -> None:
        held = self._held[identity]
        held.num_holders -= 1
        if held.num_holders == 0:
            del self._held[identity]
            self.live_bytes -= held.num_bytes

    def _update_peak(self) -> None:
        elsewhere = self._carries.bytes_in_use + self._weight_gradients.bytes_in_use
        self.peak_bytes = max(self.peak_bytes, self.live_bytes - self._at_rest + elsewhere)


@dataclass
class _Storage:
    """A storage that saved tensors share, and the size with which it is counted."""

    storage: torch.UntypedStorage
    num_bytes: int
    num_holders: int = 0


class _Saved:
    """Keeps a tensor for autograd and tells the meter when autograd drops it."""

    __slots__ = ("identity", "meter", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor, identity: int) -> None:
        self.meter, self.tensor, self.identity = meter, tensor, identity

    def __del__(self) -> None:
        self.meter._drop(self.identity)


@contextmanager
def _hooks_owned_by(count: Callable[[Any], Any]) -> Iterator[None]:
    """Let ``count`` see what every pair of hooks packs that is opened inside.

    Autograd calls the innermost pair only, so each pair gets ``count`` behind its own.
    """
    enter = saved_tensors_hooks.__enter__

    def owned(hooks: saved_tensors_hooks) -> None:
        pack, unpack = hooks.pack_hook, hooks.unpack_hook
        hooks.pack_hook = lambda tensor: count(pack(tensor))
        hooks.unpack_hook = lambda packed: unpack(_unwrapped(packed))
        try:
            enter(hooks)
        finally:
            hooks.pack_hook, hooks.unpack_hook = pack, unpack

    saved_tensors_hooks.__enter__ = owned  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]


def _unwrapped(packed: Any) -> Any:
    if isinstance(packed, _Saved):
        return packed.tensor
    if isinstance(packed, Tensor):  # a constant
        return packed
    return pytree.tree_map_only(_Saved, lambda saved: saved.tensor, packed)


def _identity(tensor: Tensor) -> int:
    """Return what a storage is known by while it lives, wherever its data move."""
    return tensor.untyped_storage()._cdata
