"""The attention of cuDNN that ships inside torch for CUDA; no extra package."""

import torch
from torch import Tensor

from seq1f1b.attention.kernels.bottom_right import AMPERE, HALF, generation
from seq1f1b.attention.kernels.top_left import TopLeft

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
_NO_DROPOUT = 0.0
_LARGEST_HEAD, _HEAD_MULTIPLE = 128, 8


class Cudnn(TopLeft):
    """Taken only by name: whether two of its calls beat one of flash attention is not measured.

    It plans every new pair of lengths anew, so lengths that change from step to step do not suit
    it. Its backward is not deterministic on every GPU.
    """

    name = "cudnn"

    def available(self) -> bool:
        """Whether there is a GPU for it, and torch was built with it."""
        return generation() >= AMPERE and torch.backends.cudnn.is_available()

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        size = key.shape[-1]
        return (
            query.device.type == "cuda"
            and query.dtype in HALF
            and value.shape[-1] == size <= _LARGEST_HEAD
            and size % _HEAD_MULTIPLE == 0
            and not torch.are_deterministic_algorithms_enabled()
            and self.available()
        )

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See TopLeft."""
        output, log_sum_exp, *_ = _forward(
            q, k, v, None, True, _NO_DROPOUT, causal, False, scale=scale
        )
        return output, log_sum_exp.squeeze(-1)

    def run_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        scale: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See TopLeft."""
        state = torch.zeros((), dtype=torch.long, device=q.device)  # of dropout, which is off
        return _backward(
            *(grad, q, k, v, output, log_sum_exp[..., None], state, state, None, None, None),
            *(q.shape[2], k.shape[2], _NO_DROPOUT, causal),
            scale=scale,
        )
