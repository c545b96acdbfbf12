"""The attention of cuDNN that ships inside torch for CUDA; no extra package."""

import torch
from torch import Tensor

from seq1f1b.attention.kernels.cuda import AMPERE, HALF, CudaKernel, generation
from seq1f1b.attention.kernels.interface import Attended, Inputs
from seq1f1b.attention.kernels.limits import Limits
from seq1f1b.attention.kernels.top_left import TopLeft

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_NO_DROPOUT = 0.0


class Cudnn(CudaKernel, TopLeft):
    """Taken only by name: whether two of its calls beat one of flash attention is not measured.

    It plans every new pair of lengths anew, so lengths that change from step to step do not suit
    it. Its backward is not deterministic on every GPU.
    """

    name = "cudnn"
    limits = Limits(
        "a GPU from Ampere on; only by name",
        device="cuda",
        dtypes=HALF,
        largest_head=128,
        head_multiple=8,
        largest_deterministic=0,
    )

    def available(self) -> bool:
        """See CudaKernel."""
        return generation() >= AMPERE and torch.backends.cudnn.is_available()

    def run_forward(self, inputs: Inputs, *, causal: bool) -> Attended:
        """See TopLeft."""
        q, k, v, scale = inputs
        output, log_sum_exp, *_ = _forward(
            q, k, v, None, True, _NO_DROPOUT, causal, False, scale=scale
        )
        return Attended(output, log_sum_exp.squeeze(-1))

    def run_backward(
        self, grad: Tensor, inputs: Inputs, attended: Attended, *, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See TopLeft."""
        q, k, v, scale = inputs
        output, log_sum_exp = attended
        state = torch.zeros((), dtype=torch.long, device=q.device)  # of dropout, which is off
        return _backward(
            *(grad, q, k, v, output, log_sum_exp[..., None], state, state, None, None, None),
            *(q.shape[2], k.shape[2], _NO_DROPOUT, causal),
            scale=scale,
        )
