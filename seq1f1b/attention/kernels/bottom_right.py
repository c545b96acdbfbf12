"""What flash-attention kernels for CUDA have in common, whoever builds them.

Their causal mask is aligned to the bottom right, so one call serves a sub-sequence with its prefix;
groups of heads share keys and values; and documents of different lengths go into one call.
"""

from abc import abstractmethod
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from seq1f1b.attention.kernels.cuda import CudaKernel
from seq1f1b.attention.kernels.interface import Attended, Gradients, Inputs


class BottomRight(CudaKernel):
    """Subclasses call the kernel.

    Tensors are ``[b, s, heads, dim]`` to subclasses, or ``[tokens, heads, dim]`` with ``bounds``,
    the cumulative lengths of documents, of which the longest has ``longest`` tokens.
    """

    name: str

    @abstractmethod
    def run_forward(self, inputs: Inputs, bounds: Tensor | None, longest: int) -> Attended:
        """Return the output and the log-sum-exp, in the kernel's own layout."""

    @abstractmethod
    def run_backward(
        self, grad: Tensor, inputs: Inputs, attended: Attended, bounds: Tensor | None, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""

    def forward(self, inputs: Inputs) -> Attended:
        """See Kernel."""
        output, log_sum_exp = self.run_forward(inputs.each(_batch_first), None, 0)
        return Attended(_batch_first(output), log_sum_exp)

    def backward(self, grad_output: Tensor, inputs: Inputs, attended: Attended) -> Gradients:
        """See Kernel."""
        own = attended._replace(output=_batch_first(attended.output))
        grads = self.run_backward(
            _batch_first(grad_output), inputs.each(_batch_first), own, None, 0
        )
        return Gradients.of_all(*map(_batch_first, grads))

    def forward_packed(self, inputs: Inputs, lengths: tuple[int, ...]) -> Attended:
        """See PackedKernel."""
        bounds = _bounds(lengths, inputs.query.device)
        output, log_sum_exp = self.run_forward(inputs.each(_only_row), bounds, max(lengths))
        return Attended(output[:, None], log_sum_exp)

    def backward_packed(
        self, grad_output: Tensor, inputs: Inputs, attended: Attended, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See PackedKernel."""
        own = attended._replace(output=_only_row(attended.output))
        bounds = _bounds(lengths, inputs.query.device)
        grad_query, grad_key, grad_value = self.run_backward(
            _only_row(grad_output), inputs.each(_only_row), own, bounds, max(lengths)
        )
        return grad_query[:, None], grad_key[:, None], grad_value[:, None]


def _batch_first(x: Tensor) -> Tensor:
    """``[s, b, heads, dim]`` to ``[b, s, heads, dim]``, and back."""
    return x.transpose(0, 1)


def _only_row(x: Tensor) -> Tensor:
    """``[s, 1, heads, dim]`` to ``[s, heads, dim]``."""
    return x[:, 0]


@lru_cache(maxsize=256)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return cumulative lengths as kernels take them; all layers of an action share them."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
