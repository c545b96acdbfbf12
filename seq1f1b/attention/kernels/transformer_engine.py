"""Transformer-engine's fused attention, which is cuDNN's with a mask at the bottom right."""

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from seq1f1b.attention.kernels.cuda import (
    AMPERE,
    HALF,
    CudaKernel,
    generation,
    is_installed,
)
from seq1f1b.attention.kernels.interface import Attended, Gradients, Inputs
from seq1f1b.attention.kernels.limits import Limits

_OLDEST = (2, 0)
_PACKAGE = "transformer_engine.pytorch"
_SHAPE_AND_MASK = {
    "qkv_layout": "sbhd_sbhd_sbhd",
    "attn_mask_type": "causal_bottom_right",
    "window_size": (-1, 0),
    "attn_bias_type": "no_bias",
    "dropout": 0.0,
}


class TransformerEngine(CudaKernel):
    """Taken only by name: it is not measured, and cuDNN before 9.7 wants lengths in 64s.

    One call serves a sub-sequence with its prefix, and values may be narrower than keys.
    Deterministic when torch is told to be.
    """

    name = "transformer-engine"
    limits = Limits(
        "a GPU from Ampere on, package transformer-engine from {}.{} on; only by name".format(
            *_OLDEST
        ),
        device="cuda",
        dtypes=HALF,
        largest_head=128,
        head_multiple=8,
        equal_heads=False,
    )

    def available(self) -> bool:
        """See CudaKernel."""
        return is_installed("transformer-engine", _OLDEST) and generation() >= AMPERE

    def forward(self, inputs: Inputs) -> Attended:
        """See Kernel; the log-sum-exp is ``[b, heads, n, 1]``."""
        q, k, v, scale = inputs.each(Tensor.contiguous)
        output, (log_sum_exp, *_) = _functions().fused_attn_fwd(
            is_training=True, q=q, k=k, v=v, **_options(q, k, scale)
        )
        return Attended(output, log_sum_exp)

    def backward(self, grad_output: Tensor, inputs: Inputs, attended: Attended) -> Gradients:
        """See Kernel."""
        q, k, v, scale = inputs.each(Tensor.contiguous)
        state = torch.zeros(2, dtype=torch.int64, device=q.device)  # of dropout, which is off
        types = importlib.import_module(f"{_PACKAGE}.constants").TE_DType
        grad_query, grad_key, grad_value, *_ = _functions().fused_attn_bwd(
            q=q,
            k=k,
            v=v,
            o=attended.output.contiguous(),
            d_o=grad_output.contiguous(),
            dqkv_dtype=types[q.dtype],
            aux_ctx_tensors=[attended.log_sum_exp, state],
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_options(q, k, scale),
        )
        return Gradients.of_all(grad_query, grad_key, grad_value)


def _options(q: Tensor, k: Tensor, scale: float) -> dict[str, Any]:
    """Return what forward and backward are told alike, by name: places differ between versions."""
    (num_queries, num_sequences, *_), num_keys = q.shape, k.shape[0]
    is_told_alignment = _takes(_functions().fused_attn_fwd, "bottom_right_diagonal")
    alignment = {"bottom_right_diagonal": True} if is_told_alignment else {}
    return {
        "max_seqlen_q": num_queries,
        "max_seqlen_kv": num_keys,
        "cu_seqlens_q": _bounds(num_sequences, num_queries, q.device),
        "cu_seqlens_kv": _bounds(num_sequences, num_keys, q.device),
        "fake_dtype": q.dtype,
        "fused_attention_backend": _functions().FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": scale,
        **_SHAPE_AND_MASK,
        **alignment,
    }


@lru_cache(maxsize=256)
def _bounds(num_sequences: int, length: int, device: torch.device) -> Tensor:
    """Return cumulative lengths of sequences that are equally long."""
    return torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length


@lru_cache(maxsize=8)
def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether the function has an option that versions of the package differ in."""
    return name in inspect.signature(function).parameters


def _functions() -> Any:
    return importlib.import_module(f"{_PACKAGE}.cpp_extensions.fused_attn")
