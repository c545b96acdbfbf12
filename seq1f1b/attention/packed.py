"""Attention of one sub-sequence over packed documents, which never look at each other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from seq1f1b.attention.carry import LayerCarry
from seq1f1b.attention.kernels import Attended, Inputs, Kernel, PackedKernel
from seq1f1b.attention.prefix_causal import backward_with_carry, forward_with_carry
from seq1f1b.sequence import Documents, SubSequence


class DocumentCarry(Protocol):
    """Finds the carry of one document."""

    def __call__(
        self, row: int, document: int, total: int, keys: Tensor, values: Tensor
    ) -> LayerCarry:
        """Return it, made on first use; arguments as those of ``CarryPool.carry``."""
        ...


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: Kernel,
    scale: float,
    part: SubSequence,
    documents: Sequence[Documents],
    carry_of: DocumentCarry,
) -> Tensor:
    """Attend from every token of ``part`` to itself and to what precedes it in its own document.

    Shapes are those of ``causal_attention``; ``documents`` has an entry for each of the b rows. A
    document that a cut runs through has a carry of its own, in which its tokens count from its
    start. Nothing else is carried: a document within ``part`` needs no keys from elsewhere.
    Raises ValueError when the tensors are not of ``part`` and ``documents``.
    """
    if query.shape[0] != part.length or query.shape[1] != len(documents):
        raise ValueError(
            f"attention got {query.shape[0]} tokens of {query.shape[1]} rows for sub-sequence "
            f"{part.index}, which has {part.length} of {part.total} in {len(documents)} rows: cut "
            f"the batch along the sequence first, and keep its rows apart"
        )
    together = isinstance(kernel, PackedKernel)
    calls = [
        call
        for row, of_row in enumerate(documents)
        for call in _calls(row, of_row, part, carry_of, key, value, together=together)
    ]
    return _Packed.apply(query, key, value, calls, scale, kernel)


@dataclass(frozen=True)
class _Call:
    """One call of the kernel: tokens ``tokens`` of a row, which are a piece of one document that
    has a carry, or whole documents of ``lengths`` tokens.
    """

    row: int
    tokens: slice
    piece: SubSequence
    lengths: tuple[int, ...]
    carry: LayerCarry | None

    def of(self, x: Tensor) -> Tensor:
        """Return this call's tokens of ``x``, ``[n, b, heads, dim]``, as a batch of 1."""
        return x[self.tokens, self.row : self.row + 1]


def _calls(
    row: int,
    documents: Documents,
    part: SubSequence,
    carry_of: DocumentCarry,
    key: Tensor,
    value: Tensor,
    *,
    together: bool,
) -> Iterator[_Call]:
    """Yield the calls for one row; whole neighbours share one if the kernel takes them together."""
    begin = 0

    def as_groups(entry: tuple[int, SubSequence]) -> int:
        number, piece = entry
        return -1 if together and piece.is_whole else number

    for _, entries in groupby(documents.pieces(part), key=as_groups):
        group = list(entries)
        number, piece = group[0]
        lengths = tuple(piece.length for _, piece in group)
        tokens = slice(begin, begin + sum(lengths))
        carry = None
        if not piece.is_whole:
            own = tokens, slice(row, row + 1)
            carry = carry_of(row, number, piece.total, key[own], value[own])
        yield _Call(row, tokens, piece, lengths, carry)
        begin = tokens.stop


class _Packed(torch.autograd.Function):
    """Keys and values of cut documents go into their carries, those of whole ones are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: Sequence[_Call],
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        # A view of the fused projection would keep its keys and values alive as well.
        query = query.contiguous()
        output = query.new_empty(*query.shape[:3], value.shape[3])
        saved = []
        for call in calls:
            q, k, v = (call.of(x) for x in (query, key, value))
            if call.carry is not None:
                own, log_sum_exp = forward_with_carry(
                    q, k, v, call.carry, call.piece, scale, kernel
                )
                saved += [log_sum_exp]
            else:
                # Copies, because a view would keep alive what the carries already hold.
                k, v = k.clone(), v.clone()
                own, log_sum_exp = _forward_whole(kernel, Inputs(q, k, v, scale), call.lengths)
                saved += [log_sum_exp, k, v]
            call.of(output).copy_(own)
        ctx.save_for_backward(query, output, *saved)
        ctx.calls, ctx.scale, ctx.kernel = calls, scale, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        query, output, *rest = ctx.saved_tensors
        saved = iter(rest)
        grad_output = grad_output.contiguous()
        pieces = []
        for call in ctx.calls:
            grad, q, out = (call.of(x) for x in (grad_output, query, output))
            attended = Attended(out, next(saved))
            if call.carry is not None:
                grads = backward_with_carry(
                    grad, q, attended, call.carry, call.piece, ctx.scale, ctx.kernel
                )
            else:
                inputs = Inputs(q, next(saved), next(saved), ctx.scale)
                grads = _backward_whole(ctx.kernel, grad, inputs, attended, call.lengths)
            pieces.append(grads)
        num_rows = query.shape[1]
        by_row = [
            [grads for call, grads in zip(ctx.calls, pieces, strict=True) if call.row == row]
            for row in range(num_rows)
        ]
        columns = [[torch.cat(x) for x in zip(*grads, strict=True)] for grads in by_row]
        gradients = [torch.cat(rows, dim=1) for rows in zip(*columns, strict=True)]
        return *gradients, None, None, None


def _forward_whole(kernel: Kernel, inputs: Inputs, lengths: tuple[int, ...]) -> Attended:
    if len(lengths) > 1 and isinstance(kernel, PackedKernel):
        return kernel.forward_packed(inputs, lengths)
    return kernel.forward(inputs)


def _backward_whole(
    kernel: Kernel, grad: Tensor, inputs: Inputs, attended: Attended, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    if len(lengths) > 1 and isinstance(kernel, PackedKernel):
        return kernel.backward_packed(grad, inputs, attended, lengths)
    gradients = kernel.backward(grad, inputs, attended)
    return gradients.query, gradients.key, gradients.value
