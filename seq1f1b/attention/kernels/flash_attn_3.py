"""FlashAttention-3 for Hopper (arXiv 2407.08608), built from flash-attention's ``hopper``."""

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seq1f1b.attention.kernels.bottom_right import BottomRight
from seq1f1b.attention.kernels.cuda import HALF, generation
from seq1f1b.attention.kernels.interface import Attended, Inputs
from seq1f1b.attention.kernels.limits import Limits

_HOPPER = 9


class FlashAttn3(BottomRight):
    """Takes the head sizes of DeepSeek's latent attention too."""

    name = "flash-attn-3"
    limits = Limits(
        "a Hopper GPU, flash-attention's `hopper` built",
        device="cuda",
        dtypes=HALF,
        largest_head=256,
        head_multiple=8,
        other_heads=((192, 128),),
        largest_deterministic=192,
    )

    def available(self) -> bool:
        """See CudaKernel."""
        return _usable()

    def run_forward(self, inputs: Inputs, bounds: Tensor | None, longest: int) -> Attended:
        """See BottomRight."""
        q, k, v, scale = inputs
        most = None if bounds is None else longest
        # By place: older builds have no defaults, and the places are the same. The arguments in
        # between are a cache of keys, pages, rotation and scales of 8-bit types.
        output, log_sum_exp, *_ = _package()._flash_attn_forward(
            *(q, k, v, None, None, None, None, bounds, bounds, None, None, None, most, most),
            *([None] * 9),
            *(scale, True),
        )
        return Attended(output, log_sum_exp)

    def run_backward(
        self, grad: Tensor, inputs: Inputs, attended: Attended, bounds: Tensor | None, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See BottomRight."""
        q, k, v, scale = inputs
        most = None if bounds is None else longest
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # By place: the name of the argument for causality is not the same in all versions.
        _package()._flash_attn_backward(
            *(grad, q, k, v, *attended, bounds, bounds, None, None, most, most),
            *(*grads, scale, True),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return grads


@lru_cache(maxsize=1)
def _usable() -> bool:
    is_built = importlib.util.find_spec("flash_attn_interface") is not None
    return is_built and generation() == _HOPPER


def _package() -> Any:
    return importlib.import_module("flash_attn_interface")
