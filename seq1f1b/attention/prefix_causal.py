"""Differentiable causal attention of one sub-sequence, with or without a KV carry."""

from typing import Any

import torch
from torch import Tensor

from seq1f1b.attention.carry import LayerCarry
from seq1f1b.attention.kernels import Attended, Inputs, Kernel
from seq1f1b.sequence import SubSequence


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: Kernel,
    scale: float,
    carry: LayerCarry | None = None,
    part: SubSequence | None = None,
) -> Tensor:
    """Attend from the tokens of ``part`` to themselves and to everything before them.

    query ``[n, b, heads, k dim]``, key ``[n, b, kv heads, k dim]`` and value
    ``[n, b, kv heads, v dim]`` are those of ``part``; ``carry`` supplies earlier keys and values
    and takes these. Without ``carry`` the tensors are a whole sequence. Returns
    ``[n, b, heads, v dim]``. Raises ValueError when there are not as many tokens as in ``part``.
    """
    if carry is not None and part is not None:
        if query.shape[0] != part.length:
            raise ValueError(
                f"attention got {query.shape[0]} tokens for sub-sequence {part.index}, which has "
                f"{part.length} of {part.total}: cut the batch along the sequence first"
            )
        return _PrefixCausal.apply(query, key, value, carry, part, scale, kernel)
    return _WholeCausal.apply(query, key, value, scale, kernel)


def forward_with_carry(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    carry: LayerCarry,
    part: SubSequence,
    scale: float,
    kernel: Kernel,
) -> Attended:
    """Store keys and values in ``carry`` and return what the kernel does; autograd sees nothing.

    Shapes are those of ``causal_attention``.
    """
    carry.write(part, key, value)
    return kernel.forward(_with_prefix(query, carry, part, scale))


def backward_with_carry(
    grad_output: Tensor,
    query: Tensor,
    attended: Attended,
    carry: LayerCarry,
    part: SubSequence,
    scale: float,
    kernel: Kernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, with those that later parts left in ``carry``.

    Gradients of the prefix are added to its accumulators.
    """
    gradients = kernel.backward(grad_output, _with_prefix(query, carry, part, scale), attended)
    if gradients.before is not None:
        carry.add_before(part, *gradients.before)
    from_later = carry.gradients_of(part)
    if from_later is not None:
        # One pass each: added in the accumulator's precision, rounded into the gradient itself.
        torch.add(from_later[0], gradients.key, out=gradients.key)
        torch.add(from_later[1], gradients.value, out=gradients.value)
    return gradients.query, gradients.key, gradients.value


def _with_prefix(query: Tensor, carry: LayerCarry, part: SubSequence, scale: float) -> Inputs:
    return Inputs(query, carry.keys[: part.stop], carry.values[: part.stop], scale)


class _PrefixCausal(torch.autograd.Function):
    """Keys and values go into the carry; their gradients come back through its accumulators."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        carry: LayerCarry,
        part: SubSequence,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        # A view of the fused projection would keep its keys and values alive as well.
        query = query.contiguous()
        attended = forward_with_carry(query, key, value, carry, part, scale, kernel)
        ctx.save_for_backward(query, *attended)
        ctx.others = carry, part, scale, kernel
        return attended.output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        query, *attended = ctx.saved_tensors
        grads = backward_with_carry(
            grad_output.contiguous(), query, Attended(*attended), *ctx.others
        )
        return *grads, None, None, None, None


class _WholeCausal(torch.autograd.Function):
    """The same kernel on a sequence that is not cut."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, kernel: Kernel
    ) -> Tensor:
        attended = kernel.forward(Inputs(query, key, value, scale))
        ctx.save_for_backward(query, key, value, *attended)
        ctx.scale, ctx.kernel = scale, kernel
        return attended.output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        query, key, value, *attended = ctx.saved_tensors
        inputs = Inputs(query, key, value, ctx.scale)
        grads = ctx.kernel.backward(grad_output.contiguous(), inputs, Attended(*attended))
        return grads.query, grads.key, grads.value, None, None
