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
from seq1f1b.attention.kernels.interface import Gradients


class BottomRight(CudaKernel):
    """Subclasses call the kernel.

    Tensors are ``[b, s, heads, dim]`` to subclasses, or ``[tokens, heads, dim]`` with ``bounds``,
    the cumulative lengths of documents, of which the longest has ``longest`` tokens.
    """

    name: str

    @abstractmethod
    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None, longest: int
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the log-sum-exp, in the kernel's own layout."""

    @abstractmethod
    def run_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        scale: float,
        bounds: Tensor | None,
        longest: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        output, log_sum_exp = self.run_forward(q, k, v, scale, None, 0)
        return output.transpose(0, 1), log_sum_exp

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
        grad, q, k, v, out = (x.transpose(0, 1) for x in (grad_output, query, key, value, output))
        grads = self.run_backward(grad, q, k, v, out, log_sum_exp, scale, None, 0)
        return Gradients.of_all(*(x.transpose(0, 1) for x in grads))

    def forward_packed(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        """See PackedKernel."""
        q, k, v = (x[:, 0] for x in (query, key, value))
        bounds = _bounds(lengths, query.device)
        output, log_sum_exp = self.run_forward(q, k, v, scale, bounds, max(lengths))
        return output[:, None], log_sum_exp

    def backward_packed(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        lengths: tuple[int, ...],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See PackedKernel."""
        grad, q, k, v, out = (x[:, 0] for x in (grad_output, query, key, value, output))
        bounds, longest = _bounds(lengths, query.device), max(lengths)
        grads = self.run_backward(grad, q, k, v, out, log_sum_exp, scale, bounds, longest)
        grad_query, grad_key, grad_value = (x[:, None] for x in grads)
        return grad_query, grad_key, grad_value


@lru_cache(maxsize=256)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return cumulative lengths as kernels take them; all layers of an action share them."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
