"""The FlashAttention-2 kernel that ships inside torch for CUDA; no extra package.

Its causal mask is aligned to the bottom right, so one call serves a sub-sequence with its prefix.
"""

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

_NO_DROPOUT = 0.0


class TorchFlash:
    """Half-precision types, equal head sizes of keys and values up to 256."""

    name = "torch-flash"

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        return (
            query.device.type == "cuda"
            and query.dtype in (torch.float16, torch.bfloat16)
            and key.shape[-1] == value.shape[-1] <= 256
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See Kernel; the log-sum-exp is ``[b, heads, n]``."""
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], _NO_DROPOUT, True, False, scale=scale
        )
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
        prefix_gradients: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Kernel."""
        grad, q, k, v, out = (x.transpose(0, 1) for x in (grad_output, query, key, value, output))
        unused = torch.empty(0, dtype=torch.uint64, device=query.device)
        grad_query, grad_key, grad_value = torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            log_sum_exp,
            None,
            None,
            q.shape[1],
            k.shape[1],
            _NO_DROPOUT,
            True,
            unused,
            unused,
            scale=scale,
        )
        grad_query, grad_key, grad_value = (
            x.transpose(0, 1) for x in (grad_query, grad_key, grad_value)
        )
        prefix = key.shape[0] - query.shape[0]
        if prefix_gradients is not None:
            prefix_gradients[0].add_(grad_key[:prefix])
            prefix_gradients[1].add_(grad_value[:prefix])
        return grad_query, grad_key[prefix:], grad_value[prefix:]

    def forward_packed(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> tuple[Tensor, Tensor]:
        """See PackedKernel; the log-sum-exp has the kernel's own layout."""
        q, k, v = (x[:, 0] for x in (query, key, value))
        bounds, longest = _bounds(lengths, query.device), max(lengths)
        output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, _NO_DROPOUT, True, False, scale=scale
        )
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
        unused = torch.empty(0, dtype=torch.uint64, device=query.device)
        grads = torch.ops.aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            log_sum_exp,
            bounds,
            bounds,
            longest,
            longest,
            _NO_DROPOUT,
            True,
            unused,
            unused,
            scale=scale,
        )
        grad_query, grad_key, grad_value = (x[:, None] for x in grads)
        return grad_query, grad_key, grad_value


@lru_cache(maxsize=256)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return cumulative lengths as the kernel takes them; all layers of an action share them."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
