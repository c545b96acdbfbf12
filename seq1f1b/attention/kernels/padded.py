"""A kernel that wants one head size, for keys that are wider than values.

Multi-latent attention has such heads. Values are padded with zeros to the width of the keys; the
output's columns beyond the values' are then zero, and so are their gradients.
"""

from torch import Tensor
from torch.nn.functional import pad

from seq1f1b.attention.kernels.interface import Attended, Gradients, Inputs, Kernel


class Padded:
    """``kernel`` with padded values."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.name = f"{kernel.name}, values padded"

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        return value.shape[-1] < key.shape[-1] and self._kernel.supports(query, key, key)

    def forward(self, inputs: Inputs) -> Attended:
        """See Kernel."""
        output, log_sum_exp = self._kernel.forward(_wide(inputs))
        return Attended(output[..., : inputs.value.shape[-1]], log_sum_exp)

    def backward(self, grad_output: Tensor, inputs: Inputs, attended: Attended) -> Gradients:
        """See Kernel."""
        key, width = inputs.key, inputs.value.shape[-1]
        wide_attended = attended._replace(output=_widen(attended.output, key))
        wide = self._kernel.backward(_widen(grad_output, key), _wide(inputs), wide_attended)
        before = wide.before and (wide.before[0], wide.before[1][..., :width])
        return Gradients(wide.query, wide.key, wide.value[..., :width], before)


def _wide(inputs: Inputs) -> Inputs:
    return inputs._replace(value=_widen(inputs.value, inputs.key))


def _widen(values: Tensor, key: Tensor) -> Tensor:
    return pad(values, (0, key.shape[-1] - values.shape[-1]))
