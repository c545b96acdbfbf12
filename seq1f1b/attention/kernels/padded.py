"""A kernel that wants one head size, for keys that are wider than values.

Multi-latent attention has such heads. Values are padded with zeros to the width of the keys; the
output's columns beyond the values' are then zero, and so are their gradients.
"""

from torch import Tensor
from torch.nn.functional import pad

from seq1f1b.attention.kernels.interface import Gradients, Kernel


class Padded:
    """``kernel`` with padded values."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.name = f"{kernel.name}, values padded"

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        return value.shape[-1] < key.shape[-1] and self._kernel.supports(query, key, key)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        width = value.shape[-1]
        output, log_sum_exp = self._kernel.forward(query, key, _widen(value, key), scale)
        return output[..., :width], log_sum_exp

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        scale: float,
    ) -> Gradients:
        """See Kernel."""
        width = value.shape[-1]
        wide = self._kernel.backward(
            _widen(grad_output, key),
            query,
            key,
            _widen(value, key),
            _widen(output, key),
            log_sum_exp,
            scale,
        )
        before = wide.before and (wide.before[0], wide.before[1][..., :width])
        return Gradients(wide.query, wide.key, wide.value[..., :width], before)


def _widen(values: Tensor, key: Tensor) -> Tensor:
    return pad(values, (0, key.shape[-1] - values.shape[-1]))
