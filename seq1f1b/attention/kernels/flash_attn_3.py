"""FlashAttention-3 for Hopper (arXiv 2407.08608), built from flash-attention's ``hopper``."""

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seq1f1b.attention.kernels.bottom_right import BottomRight

_HOPPER = 9
_LATENT_HEADS = (192, 128)


class FlashAttn3(BottomRight):
    """Takes the head sizes of DeepSeek's latent attention too."""

    name = "flash-attn-3"

    def available(self) -> bool:
        """See BottomRight."""
        return _usable()

    def takes_heads(self, key_size: int, value_size: int) -> bool:
        """See BottomRight."""
        return super().takes_heads(key_size, value_size) or (key_size, value_size) == _LATENT_HEADS

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: Tensor | None, longest: int
    ) -> tuple[Tensor, Tensor]:
        """See BottomRight."""
        most = None if bounds is None else longest
        output, log_sum_exp, *_ = _package()._flash_attn_forward(
            q,
            k,
            v,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=most,
            max_seqlen_k=most,
            softmax_scale=scale,
            causal=True,
        )
        return output, log_sum_exp

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
        """See BottomRight."""
        most = None if bounds is None else longest
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # By place: the name of the argument for causality is not the same in all versions.
        _package()._flash_attn_backward(
            *(grad, q, k, v, output, log_sum_exp, bounds, bounds, None, None, most, most),
            *(*grads, scale, True),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


@lru_cache(maxsize=1)
def _usable() -> bool:
    is_built = importlib.util.find_spec("flash_attn_interface") is not None
    return is_built and torch.cuda.get_device_capability()[0] == _HOPPER


def _package() -> Any:
    return importlib.import_module("flash_attn_interface")
