"""The FlashAttention-2 kernel that ships inside torch for CUDA; no extra package."""

import torch
from torch import Tensor

from seq1f1b.attention.kernels.bottom_right import BottomRight
from seq1f1b.attention.kernels.cuda import AMPERE, HALF, generation
from seq1f1b.attention.kernels.interface import Attended, Inputs
from seq1f1b.attention.kernels.limits import Limits

_NO_DROPOUT = 0.0


class TorchFlash(BottomRight):
    """Torch itself makes its backward deterministic when it is told to be."""

    name = "torch-flash"
    limits = Limits(
        "a GPU from Ampere on", device="cuda", dtypes=HALF, largest_head=256, head_multiple=8
    )

    def available(self) -> bool:
        """See CudaKernel."""
        return generation() >= AMPERE

    def run_forward(self, inputs: Inputs, bounds: Tensor | None, longest: int) -> Attended:
        """See BottomRight."""
        q, k, v, scale = inputs
        most = (q.shape[1], k.shape[1]) if bounds is None else (longest, longest)
        output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, *most, _NO_DROPOUT, True, False, scale=scale
        )
        return Attended(output, log_sum_exp)

    def run_backward(
        self, grad: Tensor, inputs: Inputs, attended: Attended, bounds: Tensor | None, longest: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See BottomRight."""
        q, k, v, scale = inputs
        most = (q.shape[1], k.shape[1]) if bounds is None else (longest, longest)
        state = torch.empty(0, dtype=torch.uint64, device=q.device)  # of dropout, which is off
        return torch.ops.aten._flash_attention_backward(
            *(grad, q, k, v, *attended, bounds, bounds, *most),
            *(_NO_DROPOUT, True, state, state),
            scale=scale,
        )
