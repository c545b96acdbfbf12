"""Torch's flash attention for the CPU, called on the prefix and on the diagonal block.

The kernel aligns its causal mask to the top left, so a sub-sequence with a prefix takes two calls:
all of the prefix without a mask, its own tokens with one. The two outputs are merged by their
log-sum-exp (FlashAttention, arXiv 2205.14135, section 3.1). In the backward each call gets the
merged output and log-sum-exp, which makes its gradients those of the whole softmax.
"""

import torch
from torch import Tensor

from seq1f1b.attention.kernels.interface import Gradients

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NO_DROPOUT = 0.0


class CpuFlash:
    """Needs keys and values of equal head size."""

    name = "cpu-flash"

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        return query.device.type == "cpu" and key.shape[-1] == value.shape[-1]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel; the log-sum-exp is ``[b * kv heads, group, n]``."""
        kv_heads = key.shape[2]
        prefix = key.shape[0] - query.shape[0]
        dtype = query.dtype
        if prefix:
            query, key, value = _exact(query, key, value)
        q = _fold_query(query, kv_heads)
        k, v = _fold_kv(key, q), _fold_kv(value, q)
        output, log_sum_exp = _forward(
            q, k[:, :, prefix:], v[:, :, prefix:], _NO_DROPOUT, True, scale=scale
        )
        if prefix:
            before, before_lse = _forward(
                q, k[:, :, :prefix], v[:, :, :prefix], _NO_DROPOUT, False, scale=scale
            )
            output.lerp_(before, torch.sigmoid(before_lse - log_sum_exp)[..., None])
            log_sum_exp = torch.logaddexp(log_sum_exp, before_lse)
        return _unfold(output, kv_heads).to(dtype), log_sum_exp

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
        kv_heads = key.shape[2]
        prefix = key.shape[0] - query.shape[0]
        dtype = query.dtype
        if prefix:
            grad_output, query, key, value, output = _exact(grad_output, query, key, value, output)
        q = _fold_query(query, kv_heads)
        k, v = _fold_kv(key, q), _fold_kv(value, q)
        grad, out = _fold_query(grad_output, kv_heads), _fold_query(output, kv_heads)

        def backward(start: int, stop: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            k_part, v_part = k[:, :, start:stop], v[:, :, start:stop]
            grad_query, grad_key, grad_value = _backward(
                grad, q, k_part, v_part, out, log_sum_exp, _NO_DROPOUT, causal, scale=scale
            )
            return grad_query, _fold_back(grad_key, kv_heads), _fold_back(grad_value, kv_heads)

        grad_query, grad_key, grad_value = backward(prefix, key.shape[0], True)
        before = None
        if prefix:
            before_query, before_key, before_value = backward(0, prefix, False)
            grad_query += before_query
            before = before_key, before_value
        return Gradients(
            _unfold(grad_query, kv_heads).to(dtype),
            grad_key.to(dtype),
            grad_value.to(dtype),
            before,
        )


def _exact(*tensors: Tensor) -> list[Tensor]:
    """Raise half precision to float32, so that two partial results are rounded once, not thrice."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _fold_query(x: Tensor, kv_heads: int) -> Tensor:
    """``[n, b, heads, dim]`` to ``[b * kv heads, group, n, dim]``, a view when x is contiguous."""
    return x.unflatten(2, (kv_heads, -1)).permute(1, 2, 3, 0, 4).flatten(0, 1)


def _fold_kv(x: Tensor, q: Tensor) -> Tensor:
    """``[c + n, b, kv heads, dim]`` to ``[b * kv heads, group, c + n, dim]``, without a copy.

    The heads of a group share their keys and values through a stride of 0.
    """
    return x.permute(1, 2, 0, 3).flatten(0, 1)[:, None].expand(-1, q.shape[1], -1, -1)


def _unfold(x: Tensor, kv_heads: int) -> Tensor:
    """``[b * kv heads, group, n, dim]`` to ``[n, b, heads, dim]``."""
    return x.unflatten(0, (-1, kv_heads)).permute(3, 0, 1, 2, 4).flatten(2, 3)


def _fold_back(x: Tensor, kv_heads: int) -> Tensor:
    """``[b * kv heads, group, n, dim]`` to ``[n, b, kv heads, dim]``, summed over each group."""
    summed = x.sum(dim=1) if x.shape[1] > 1 else x[:, 0]
    return summed.unflatten(0, (-1, kv_heads)).permute(2, 0, 1, 3)
