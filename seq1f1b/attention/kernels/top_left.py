"""What flash kernels have in common whose causal mask is aligned to the top left.

Such a mask cannot let a sub-sequence look at its prefix, so that takes two calls: all of the prefix
without a mask, its own tokens with one. The two outputs are merged by their log-sum-exp
(FlashAttention, arXiv 2205.14135, section 3.1). In the backward each call gets the merged output
and log-sum-exp, which makes its gradients those of the whole softmax.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from seq1f1b.attention.kernels.interface import Attended, Gradients, Inputs


class TopLeft(ABC):
    """Subclasses call the kernel.

    To them queries are ``[b * kv heads, group, n, dim]``, where a group of heads shares keys and
    values, which are ``[b * kv heads, 1, c, dim]``; log-sum-exps are ``[b * kv heads, group, n]``.
    """

    name: str

    @abstractmethod
    def run_forward(self, inputs: Inputs, *, causal: bool) -> Attended:
        """Return the output and the log-sum-exp; the mask, if any, is square."""

    @abstractmethod
    def run_backward(
        self, grad: Tensor, inputs: Inputs, attended: Attended, *, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""

    def in_two_calls(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors as two calls get them whose results are put together."""
        return tensors

    def forward(self, inputs: Inputs) -> Attended:
        """See Kernel; the log-sum-exp is ``[b * kv heads, group, n]``."""
        query, key, value, scale = inputs
        kv_heads = key.shape[2]
        prefix = key.shape[0] - query.shape[0]
        dtype = query.dtype
        if prefix:
            query, key, value = self.in_two_calls(query, key, value)
        q, k, v = (_fold(x, kv_heads) for x in (query, key, value))
        output, log_sum_exp = self.run_forward(
            Inputs(q, k[:, :, prefix:], v[:, :, prefix:], scale), causal=True
        )
        if prefix:
            before, before_lse = self.run_forward(
                Inputs(_as_rows(q), k[:, :, :prefix], v[:, :, :prefix], scale), causal=False
            )
            output, before = raised(output), raised(before).view(q.shape)
            before_lse = before_lse.view(log_sum_exp.shape)
            output.lerp_(before, torch.sigmoid(before_lse - log_sum_exp)[..., None])
            log_sum_exp = torch.logaddexp(log_sum_exp, before_lse)
        return Attended(_as(_unfold(output, kv_heads), dtype), log_sum_exp)

    def backward(self, grad_output: Tensor, inputs: Inputs, attended: Attended) -> Gradients:
        """See Kernel."""
        query, key, value, scale = inputs
        output, log_sum_exp = attended
        kv_heads = key.shape[2]
        prefix = key.shape[0] - query.shape[0]
        dtype = query.dtype
        if prefix:
            grad_output, query, key, value, output = self.in_two_calls(
                grad_output, query, key, value, output
            )
        q, k, v = (_fold(x, kv_heads) for x in (query, key, value))
        grad, out = _fold(grad_output, kv_heads), _fold(output, kv_heads)

        def backward(
            rows: tuple[Tensor, ...], tokens: slice, causal: bool
        ) -> tuple[Tensor, Tensor, Tensor]:
            grad, q, out, lse = rows
            grad_query, grad_key, grad_value = self.run_backward(
                grad,
                Inputs(q, k[:, :, tokens], v[:, :, tokens], scale),
                Attended(out, lse),
                causal=causal,
            )
            return grad_query, _unfold(grad_key, kv_heads), _unfold(grad_value, kv_heads)

        rows: tuple[Tensor, ...] = (grad, q, out, log_sum_exp)
        grad_query, grad_key, grad_value = backward(rows, slice(prefix, None), True)
        before = None
        if prefix:
            rows = tuple(_as_rows(x) for x in rows)
            before_query, before_key, before_value = backward(rows, slice(prefix), False)
            grad_query = raised(grad_query).add_(before_query.view(grad_query.shape))
            before = before_key, before_value
        return Gradients(
            _as(_unfold(grad_query, kv_heads), dtype),
            _as(grad_key, dtype),
            _as(grad_value, dtype),
            before,
        )


def raised(x: Tensor) -> Tensor:
    """Return half precision as float32, and anything else as it is."""
    return x.float() if x.dtype.itemsize < 4 else x


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """``[n, b, heads, dim]`` to ``[b * kv heads, group, n, dim]``, a view when x is contiguous.

    Keys and values make groups of one.
    """
    n, b, heads, dim = x.shape
    return x.reshape(n, b * kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)


def _as_rows(x: Tensor) -> Tensor:
    """``[folded, group, n, ...]`` to ``[folded, 1, group * n, ...]``.

    Where no mask tells them apart, queries of a group are rows of one head: more of them for a
    kernel's blocks, and gradients of keys and values come summed.
    """
    return x.reshape(x.shape[0], 1, -1, *x.shape[3:])


def _unfold(x: Tensor, kv_heads: int) -> Tensor:
    """``[b * kv heads, group, n, dim]`` to ``[n, b, heads, dim]``."""
    folded, group, n, dim = x.shape
    return x.permute(2, 0, 1, 3).reshape(n, folded // kv_heads, kv_heads * group, dim)
