"""Trade rows for heads: from this rank's rows of all heads to its blocks of all rows, and back."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seq1f1b.ulysses.mesh import SequenceParallel
from seq1f1b.ulysses.units import Block

Route = Sequence[Sequence[Block]]
"""The blocks of one tensor that each rank of the group holds."""

Shape = tuple[int, int, int]
"""Sequences of the batch, heads, and the size of a head."""


class Exchange:
    """Moves the rows ``[b, heads, shard, dim]`` of this rank to blocks ``[b, heads, rows, dim]``.

    Either direction is one all-to-all for any number of tensors, and each is the other's gradient.
    """

    def __init__(self, parallel: SequenceParallel, shard: int, begin: int = 0) -> None:
        """``begin`` is the place of rank 0's first row; the other ranks' rows follow."""
        self.parallel, self.shard, self.begin = parallel, shard, begin

    def to_blocks(
        self, tensors: Sequence[Tensor], routes: Sequence[Route]
    ) -> tuple[list[list[Tensor]], Tensor]:
        """Return this rank's blocks of each tensor, whose rows come from all ranks, and a token.

        The token, a zero of the tensors' type, goes to ``to_rows``: so this rank takes part in the
        exchanges of the backward pass even if it has no block.
        """
        *flat, token = _ToBlocks.apply(self, routes, *tensors)
        blocks = iter(flat)
        return [[next(blocks) for _ in route[self.parallel.rank]] for route in routes], token

    def to_rows(
        self, blocks: Sequence[Tensor], route: Route, shape: Shape, token: Tensor
    ) -> Tensor:
        """Return this rank's rows of a tensor whose blocks lie with all ranks, none twice."""
        return _ToRows.apply(self, route, shape, token, *blocks)

    def gather_blocks(self, tensors: Sequence[Tensor], routes: Sequence[Route]) -> list[Tensor]:
        """Do what ``to_blocks`` does behind autograd's back; all blocks come in one list."""
        parallel, own = self.parallel, self._rows_of(self.parallel.rank)
        pairs = list(zip(tensors, routes, strict=True))
        parcels = [
            [
                x[:, block.head : block.end, low - own[0] : high - own[0]]
                for x, route in pairs
                for block in route[rank]
                for low, high in [block.overlap(*own)]
            ]
            for rank in range(parallel.size)
        ]
        mine = [(x, block) for x, route in pairs for block in route[parallel.rank]]
        shapes = [
            [
                (x.shape[0], block.num_heads, high - low, x.shape[3])
                for x, block in mine
                for low, high in [block.overlap(*self._rows_of(rank))]
            ]
            for rank in range(parallel.size)
        ]
        received = self._all_to_all(parcels, shapes, tensors[0])
        return [torch.cat(pieces, dim=2) for pieces in zip(*received, strict=True)]

    def gather_rows(
        self,
        blocks: Sequence[Tensor],
        routes: Sequence[Route],
        shapes: Sequence[Shape],
        like: Tensor,
        *,
        overlap: bool,
    ) -> list[Tensor]:
        """Do what ``to_rows`` does behind autograd's back, for several tensors at a time.

        With ``overlap``, blocks of different ranks may overlap and are added, in at least float32.
        """
        parallel, own = self.parallel, self._rows_of(self.parallel.rank)
        mine = [block for route in routes for block in route[parallel.rank]]
        parcels = [
            [
                x[:, :, low - block.start : high - block.start]
                for x, block in zip(blocks, mine, strict=True)
                for low, high in [block.overlap(*self._rows_of(rank))]
            ]
            for rank in range(parallel.size)
        ]
        arriving = [
            [
                (index, block, *block.overlap(*own))
                for index, route in enumerate(routes)
                for block in route[rank]
            ]
            for rank in range(parallel.size)
        ]
        received = self._all_to_all(
            parcels,
            [
                [
                    (shapes[i][0], block.num_heads, high - low, shapes[i][2])
                    for i, block, low, high in x
                ]
                for x in arriving
            ],
            like,
        )
        dtype = torch.promote_types(like.dtype, torch.float32) if overlap else like.dtype
        rows = [like.new_zeros(b, heads, self.shard, d, dtype=dtype) for b, heads, d in shapes]
        for pieces, places in zip(received, arriving, strict=True):
            for piece, (i, block, low, high) in zip(pieces, places, strict=True):
                rows[i][:, block.head : block.end, low - own[0] : high - own[0]] += piece
        return [x.to(like.dtype) for x in rows]

    def _rows_of(self, rank: int) -> tuple[int, int]:
        first = self.begin + rank * self.shard
        return first, first + self.shard

    def _all_to_all(
        self, parcels: list[list[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], like: Tensor
    ) -> list[list[Tensor]]:
        """Send each rank its parcel; return the tensors of ``shapes`` that each one sent."""
        sizes_out = [sum(x.numel() for x in parcel) for parcel in parcels]
        lengths = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
        sizes_in = [sum(of_rank) for of_rank in lengths]
        nothing = like.new_empty(0)
        outgoing = torch.cat([nothing, *(x.reshape(-1) for parcel in parcels for x in parcel)])
        incoming = like.new_empty(sum(sizes_in))
        dist.all_to_all_single(incoming, outgoing, sizes_in, sizes_out, group=self.parallel.group)
        elsewhere = sum(sizes_out) - sizes_out[self.parallel.rank]
        self.parallel.traffic.bytes_sent += elsewhere * outgoing.element_size()
        self.parallel.traffic.num_exchanges += 1
        return [
            [x.view(shape) for x, shape in zip(part.split(ns), of_rank, strict=True)]
            for part, ns, of_rank in zip(incoming.split(sizes_in), lengths, shapes, strict=True)
        ]


class _ToBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, routes: Sequence[Route], *tensors: Tensor) -> Any:
        ctx.exchange, ctx.routes = exchange, routes
        ctx.shapes = [(x.shape[0], x.shape[1], x.shape[3]) for x in tensors]
        return *exchange.gather_blocks(tensors, routes), tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *blocks, like = grads
        rows = ctx.exchange.gather_rows(blocks, ctx.routes, ctx.shapes, like, overlap=True)
        return None, None, *rows


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, route: Route, shape: Shape, token: Tensor, *blocks: Tensor
    ) -> Tensor:
        ctx.exchange, ctx.route = exchange, route
        return exchange.gather_rows(blocks, [route], [shape], token, overlap=False)[0]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        blocks = ctx.exchange.gather_blocks([grad_output], [ctx.route])
        return None, None, None, grad_output.new_zeros(()), *blocks
