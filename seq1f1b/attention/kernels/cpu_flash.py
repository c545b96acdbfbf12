"""Torch's flash attention for the CPU."""

import torch
from torch import Tensor

from seq1f1b.attention.kernels.interface import Attended, Inputs
from seq1f1b.attention.kernels.limits import Limited, Limits
from seq1f1b.attention.kernels.top_left import TopLeft, raised

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NO_DROPOUT = 0.0


class CpuFlash(Limited, TopLeft):
    """Needs keys and values of equal head size."""

    name = "cpu-flash"
    limits = Limits("a CPU", device="cpu")

    def in_two_calls(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See TopLeft; in float32 two partial results are rounded once, not thrice."""
        return tuple(raised(x) for x in tensors)

    def run_forward(self, inputs: Inputs, *, causal: bool) -> Attended:
        """See TopLeft."""
        q, k, v, scale = inputs
        keys, values = _shared(k, q), _shared(v, q)
        return Attended(*_forward(q, keys, values, _NO_DROPOUT, causal, scale=scale))

    def run_backward(
        self, grad: Tensor, inputs: Inputs, attended: Attended, *, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See TopLeft."""
        q, k, v, scale = inputs
        keys, values = _shared(k, q), _shared(v, q)
        grad_query, grad_key, grad_value = _backward(
            grad, q, keys, values, *attended, _NO_DROPOUT, causal, scale=scale
        )
        return grad_query, _summed(grad_key), _summed(grad_value)


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """Give every head of a group the same keys or values, through a stride of 0."""
    return x.expand(-1, q.shape[1], -1, -1)


def _summed(x: Tensor) -> Tensor:
    """Sum gradients over each group of heads."""
    return x.sum(dim=1, keepdim=True) if x.shape[1] > 1 else x
