"""The package flash-attn, from version 2.8 on (FlashAttention-2, arXiv 2307.08691)."""

import importlib
from typing import Any

import torch
from torch import Tensor

from seq1f1b.attention.kernels.bottom_right import BottomRight
from seq1f1b.attention.kernels.cuda import AMPERE, HALF, generation, is_installed
from seq1f1b.attention.kernels.interface import Attended, Inputs
from seq1f1b.attention.kernels.limits import Limits

_OLDEST = (2, 8)
_NO_DROPOUT, _NO_WINDOW, _NO_CAP = 0.0, (-1, -1), 0.0


class FlashAttn2(BottomRight):
    """Deterministic when torch is told to be."""

    name = "flash-attn-2"
    limits = Limits(
        "a GPU from Ampere on, package flash-attn from {}.{} on".format(*_OLDEST),
        device="cuda",
        dtypes=HALF,
        largest_head=256,
        head_multiple=8,
    )

    def available(self) -> bool:
        """See CudaKernel."""
        return is_installed("flash-attn", _OLDEST) and generation() >= AMPERE

    def run_forward(self, inputs: Inputs, bounds: Tensor | None, longest: int) -> Attended:
        """See BottomRight."""
        q, k, v, scale = inputs
        package = _package()
        options = (_NO_DROPOUT, scale, True, *_NO_WINDOW, _NO_CAP, None, False)
        if bounds is None:
            output, log_sum_exp, *_ = package._flash_attn_forward(q, k, v, *options)
        else:
            output, log_sum_exp, *_ = package._flash_attn_varlen_forward(
                q, k, v, bounds, bounds, longest, longest, *options
            )
        return Attended(output, log_sum_exp)

    def run_backward(
        self, grad: Tensor, inputs: Inputs, attended: Attended, bounds: Tensor | None, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See BottomRight."""
        q, k, v, scale = inputs
        package = _package()
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = (grad, q, k, v, *attended, *grads)
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        options = (_NO_DROPOUT, scale, True, *_NO_WINDOW, _NO_CAP, None, is_deterministic)
        if bounds is None:
            package._flash_attn_backward(*given, *options)
        else:
            package._flash_attn_varlen_backward(*given, bounds, bounds, longest, longest, *options)
        return grads


def _package() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")
