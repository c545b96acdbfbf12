"""Documents and chunks through a flash-attention kernel, each from its own start."""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from seq1f1b.attention import Kernel, choose_kernel
from seq1f1b.attention.kernels import Attended, Inputs, PackedKernel
from seq1f1b.ulysses.cores.core import Core
from seq1f1b.ulysses.cores.scope import Options, Scope, Segment


@dataclass(frozen=True)
class _Piece:
    """One call of the kernel: queries and keys of some sequences, as slices of the unit's.

    lengths: of whole documents that one call takes together.
    """

    batch: slice
    queries: slice
    keys: slice
    lengths: tuple[int, ...] = ()


class KernelCore(Core):
    """Takes the kernels of ``seq1f1b.attention``: flash-attn on a GPU, torch's on a CPU."""

    name = "kernel"

    def refusal(
        self, q: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
    ) -> str:
        """See Core."""
        for what, is_there in (
            ("sliding windows", scope.pattern.window is not None),
            ("attention sinks", sinks is not None),
            ("soft-capping", options.softcap is not None),
            ("attention dropout", options.dropout > 0),
            ("padding within a document", scope.rows.has_holes),
        ):
            if is_there:
                return what
        return ""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See Core; keeps the kernel's log-sum-exp of every piece."""
        kernel = _kernel(q, k, v)
        output = q.new_zeros(*q.shape[:3], v.shape[3])
        saved = []
        for piece in _pieces(scope, isinstance(kernel, PackedKernel)):
            own = Inputs(*_tokens_first(q, k, v, piece), options.scale)
            if piece.lengths and isinstance(kernel, PackedKernel):
                part, log_sum_exp = kernel.forward_packed(own, piece.lengths)
            else:
                part, log_sum_exp = kernel.forward(own)
            output[piece.batch, :, piece.queries] = part.permute(1, 2, 0, 3)
            saved.append(log_sum_exp)
        return output, tuple(saved)

    def backward(
        self,
        grad_output: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        output: Tensor,
        saved: tuple[Tensor, ...],
        scope: Scope,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See Core; no two pieces have a key in common."""
        kernel = _kernel(q, k, v)
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        pieces = _pieces(scope, isinstance(kernel, PackedKernel))
        for piece, log_sum_exp in zip(pieces, saved, strict=True):
            own = Inputs(*_tokens_first(q, k, v, piece), options.scale)
            out, grad = (
                x[piece.batch, :, piece.queries].permute(2, 0, 1, 3) for x in (output, grad_output)
            )
            grad, attended = grad.contiguous(), Attended(out, log_sum_exp)
            if piece.lengths and isinstance(kernel, PackedKernel):
                dq, dk, dv = kernel.backward_packed(grad, own, attended, piece.lengths)
            else:
                found = kernel.backward(grad, own, attended)
                dq, dk, dv = found.query, found.key, found.value
                if found.before is not None:
                    dk = torch.cat([found.before[0].to(dk.dtype), dk])
                    dv = torch.cat([found.before[1].to(dv.dtype), dv])
            grads[0][piece.batch, :, piece.queries] = dq.permute(1, 2, 0, 3)
            grads[1][piece.batch, :, piece.keys] = dk.permute(1, 2, 0, 3)
            grads[2][piece.batch, :, piece.keys] = dv.permute(1, 2, 0, 3)
        return *grads, None


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    return choose_kernel(q.permute(2, 0, 1, 3), k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3))


def _tokens_first(q: Tensor, k: Tensor, v: Tensor, piece: _Piece) -> tuple[Tensor, Tensor, Tensor]:
    """Return the piece's tensors as kernels take them, ``[n, b, heads, dim]``."""
    return (
        q[piece.batch, :, piece.queries].permute(2, 0, 1, 3),
        k[piece.batch, :, piece.keys].permute(2, 0, 1, 3),
        v[piece.batch, :, piece.keys].permute(2, 0, 1, 3),
    )


def _pieces(scope: Scope, joins: bool) -> list[_Piece]:
    """Return the calls of the kernel: fewer where rows are alike, or where it joins documents."""
    num_rows = scope.rows.starts.shape[0]
    together = scope.rows.is_alike and not (joins and len(scope.segments(0)) > 1)
    pieces = []
    for row in range(1 if together else num_rows):
        batch = slice(0, num_rows) if together else slice(row, row + 1)
        segments = scope.segments(row)
        if joins and not together:
            for is_whole, found in groupby(segments, lambda s: s.start == s.first):
                group = list(found)
                runs = _runs(group) if is_whole else [[segment] for segment in group]
                pieces += [_piece(batch, run, scope) for run in runs]
        else:
            pieces += [_piece(batch, [segment], scope) for segment in segments]
    return pieces


def _runs(segments: list[Segment]) -> list[list[Segment]]:
    """Group segments that lie one behind the other, with no padding between them."""
    runs: list[list[Segment]] = []
    for segment in segments:
        if runs and runs[-1][-1].stop == segment.first:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _piece(batch: slice, run: list[Segment], scope: Scope) -> _Piece:
    head, stop = run[0], run[-1].stop
    return _Piece(
        batch,
        slice(head.start - scope.start, stop - scope.start),
        slice(head.first - scope.key_start, stop - scope.key_start),
        tuple(s.stop - s.start for s in run) if len(run) > 1 else (),
    )
