"""Weight gradients added to Megatron's gradient buffers by the matrix product itself, or later.

Megatron's linear layers hand (inputs, output gradient, buffer) to apex's extension
``fused_weight_gradient_mlp_cuda`` when gradients are accumulated by the product. This module
stands in its place: it does the same with torch where apex is missing, and while the
input-gradient half of a backward runs, it defers the product to the weight-gradient half.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron.adaptor.patches import Attribute
from seq1f1b.runtime import ExecutionContext

_EXTENSION = "fused_weight_gradient_mlp_cuda"


class AccumulatingProduct:
    """The two functions of apex's extension, on whatever is installed."""

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        found = importlib.util.find_spec(_EXTENSION) is not None
        self._apex: Any = importlib.import_module(_EXTENSION) if found else None

    def wgrad_gemm_accum_fp32(self, inputs: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        """Add ``gradient.T @ inputs`` to the float32 buffer ``main_grad``."""
        apex = self._apex and self._apex.wgrad_gemm_accum_fp32
        self._add(inputs, gradient, main_grad, apex)

    def wgrad_gemm_accum_fp16(self, inputs: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        """Add ``gradient.T @ inputs`` to the float16 or bfloat16 buffer ``main_grad``."""
        apex = self._apex and self._apex.wgrad_gemm_accum_fp16
        self._add(inputs, gradient, main_grad, apex)

    def _add(self, inputs: Tensor, gradient: Tensor, main_grad: Tensor, apex: Any) -> None:
        _mark_done(main_grad)
        function = apex or _accumulate

        def accumulate(inputs: Tensor, gradient: Tensor) -> None:
            function(inputs, gradient, main_grad)

        if self._context.defers_weight_gradients and _is_shared_buffer(inputs):
            inputs = inputs.clone()
        self._context.weight_gradient(accumulate, inputs, gradient)


def patches(context: ExecutionContext) -> list[Attribute]:
    """Return what puts the product in apex's place."""
    product = AccumulatingProduct(context)
    reason = "Accumulate weight gradients in the product, in the W of a split backward if any."
    layers = "megatron.core.tensor_parallel.layers"
    return [
        Attribute(f"{layers}:{_EXTENSION}", product, reason, may_be_missing=True),
        Attribute(f"{layers}:_grad_accum_fusion_available", True, reason),
        Attribute(f"megatron.core.utils:{_EXTENSION}", product, reason, may_be_missing=True),
    ]


def name_owners(parameters: Iterable[Any]) -> None:
    """Let the gradient buffer of each parameter know whose it is.

    Where autograd packs what it saves (see ActivationMeter), Megatron's linear layers get their
    weights back without the attributes by which they tell Megatron's hooks that the gradient is in
    the buffer already. The product then says it in their place.
    """
    for parameter in parameters:
        if hasattr(parameter, "main_grad"):
            parameter.main_grad.owner = parameter


def _mark_done(main_grad: Tensor) -> None:
    owner = getattr(main_grad, "owner", None)
    if owner is not None:
        owner.grad_added_to_main_grad = True
        if owner.grad is None:  # hooks for overlapped reduction want to see one
            # A weight that is an embedding too adds its other gradient to this one.
            is_added_to = getattr(owner, "zero_out_wgrad", False)
            owner.grad = torch.zeros_like(owner) if is_added_to else torch.empty_like(owner)


def _accumulate(inputs: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
    if gradient.dtype == main_grad.dtype:
        main_grad.addmm_(gradient.t(), inputs)
    elif gradient.is_cuda:
        main_grad.add_(torch.mm(gradient.t(), inputs, out_dtype=main_grad.dtype))
    else:
        main_grad.add_(gradient.t() @ inputs)


def _is_shared_buffer(tensor: Tensor) -> bool:
    """Whether Megatron gathers the inputs of every layer into this one's memory."""
    from megatron.core.parallel_state import get_global_memory_buffer

    address = tensor.untyped_storage().data_ptr()
    buffers = get_global_memory_buffer().buffer.values()
    return any(buffer.untyped_storage().data_ptr() == address for buffer in buffers)
