"""Exact count of the activations that autograd keeps alive on the CPU, and the CUDA equivalent."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from seq1f1b.attention import CarryPool
from seq1f1b.runtime.weight_gradients import WeightGradients


class ActivationMeter:
    """Peak bytes of activations over a step: what autograd saved, the KV carry, deferred work.

    On the CPU every storage that the graph holds is counted once, from the moment it is saved to
    the moment it is freed; ``constants`` (parameters and buffers) do not count. On CUDA it is the
    allocator's peak above what was allocated when the step began.
    """

    def __init__(
        self, carries: CarryPool, weight_gradients: WeightGradients, *, device: str = "cpu"
    ) -> None:
        self._carries = carries
        self._weight_gradients = weight_gradients
        self._on_cuda = device == "cuda"
        self._holders: dict[int, int] = {}
        self._constants: frozenset[int] = frozenset()
        self._at_rest = 0
        self.live_bytes = 0
        self.peak_bytes = 0

    @contextmanager
    def measuring(self, constants: Iterable[Tensor]) -> Iterator[None]:
        """Measure what runs inside, from a peak of 0."""
        self.peak_bytes = 0
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._at_rest = torch.cuda.memory_allocated()
            yield
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._at_rest
            return
        self._constants = frozenset(_address(constant) for constant in constants)
        self._carries.on_take = self._update_peak
        self._weight_gradients.on_defer = self._update_peak
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._carries.on_take = self._weight_gradients.on_defer = None

    def _pack(self, tensor: Tensor) -> "Tensor | _Saved":
        address = _address(tensor)
        if address in self._constants or tensor.device.type != "cpu":
            return tensor
        if address not in self._holders:
            self._holders[address] = 0
            self.live_bytes += tensor.untyped_storage().nbytes()
            self._update_peak()
        self._holders[address] += 1
        return _Saved(self, tensor, address)

    def _drop(self, address: int, num_bytes: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            del self._holders[address]
            self.live_bytes -= num_bytes

    def _update_peak(self) -> None:
        elsewhere = self._carries.bytes_in_use + self._weight_gradients.bytes_in_use
        self.peak_bytes = max(self.peak_bytes, self.live_bytes + elsewhere)


class _Saved:
    """Keeps a tensor for autograd and tells the meter when autograd lets go of it."""

    __slots__ = ("address", "meter", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor, address: int) -> None:
        self.meter, self.tensor, self.address = meter, tensor, address

    def __del__(self) -> None:
        self.meter._drop(self.address, self.tensor.untyped_storage().nbytes())


def _unpack(saved: "Tensor | _Saved") -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
