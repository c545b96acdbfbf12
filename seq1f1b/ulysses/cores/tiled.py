"""Attention in tiles of plain torch: any device, any pattern, memory that does not grow with pairs.

The softmax is taken over one tile of keys after the other (FlashAttention, arXiv 2205.14135,
algorithms 1 and 4). Tiles that nothing may see are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seq1f1b.ulysses.cores.core import Core
from seq1f1b.ulysses.cores.scope import Options, Scope

_FEWEST, _MOST = 2**12, 2**22
"""Scores that are alive at a time, as far as the length allows."""


class TiledCore(Core):
    """Computes in at least float32."""

    name = "tiled"

    def refusal(
        self, q: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
    ) -> str:
        """Anything goes."""
        return ""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See Core; keeps the log-sum-exp ``[b, kv heads, group, queries]``."""
        output = q.new_empty(*q.shape[:3], v.shape[3])
        log_sum_exps = []
        for strip in _strips(q, k, scope):
            queries = _grouped(q, strip.queries, k.shape[1])
            highest = queries.new_full((*queries.shape[:-1], 1), float("-inf"))
            total = torch.zeros_like(highest)
            if sinks is not None:
                highest = _per_head(sinks, queries).clone()
                total = torch.ones_like(highest)
            mixed = queries.new_zeros(*queries.shape[:-1], v.shape[3])
            for tile in strip.tiles():
                scores = _scores(queries, k, tile, scope, options)
                peak = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
                # Of a row that has seen nothing yet.
                base = peak.masked_fill(peak == float("-inf"), 0.0)
                weights = (scores - base).exp_()
                shrink = (highest - base).exp_()
                total = total * shrink + weights.sum(dim=-1, keepdim=True)
                keep = _kept(weights, tile, options)
                weights = weights if keep is None else weights * keep
                mixed = mixed * shrink + weights @ _keys(v, tile)
                highest = peak
            seen = total > 0
            total = torch.where(seen, total, 1.0)
            output[:, :, strip.queries] = _ungrouped(mixed / total).to(output.dtype)
            log_sum_exps.append(torch.where(seen, highest + total.log(), 0.0).squeeze(-1))
        return output, (torch.cat(log_sum_exps, dim=-1),)

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
        """See Core."""
        (log_sum_exp,) = saved
        dtype = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=dtype)
        for strip in _strips(q, k, scope):
            queries = _grouped(q, strip.queries, k.shape[1])
            grad = _grouped(grad_output, strip.queries, k.shape[1])
            out = _grouped(output, strip.queries, k.shape[1])
            lse = log_sum_exp[..., strip.queries, None]
            dot = (grad * out).sum(dim=-1, keepdim=True)
            if sinks is not None and grad_sinks is not None:
                weights = (_per_head(sinks, queries) - lse).exp_()
                grad_sinks -= (weights * dot).sum(dim=(0, 3, 4)).flatten()
            grad_queries = torch.zeros_like(queries)
            for tile in strip.tiles():
                scores = _scores(queries, k, tile, scope, options)
                weights = (scores - lse).exp_()
                keep = _kept(weights, tile, options)
                grad_weights = grad @ _keys(v, tile).transpose(-1, -2)
                dropped = weights
                if keep is not None:
                    dropped, grad_weights = weights * keep, grad_weights * keep
                grad_v[:, :, tile.keys] += (dropped.transpose(-1, -2) @ grad).sum(dim=2)
                grad_scores = weights * (grad_weights - dot)
                if options.softcap is not None:
                    slope = 1 - (scores / options.softcap) ** 2
                    grad_scores *= slope.masked_fill_(scores == float("-inf"), 0.0)
                grad_scores *= options.scale
                grad_queries += grad_scores @ _keys(k, tile)
                grad_k[:, :, tile.keys] += (grad_scores.transpose(-1, -2) @ queries).sum(dim=2)
            grad_q[:, :, strip.queries] = _ungrouped(grad_queries).to(q.dtype)
        sinks_gradient = None if grad_sinks is None or sinks is None else grad_sinks.to(sinks.dtype)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), sinks_gradient


@dataclass(frozen=True)
class _Tile:
    """Queries and keys of one tile, as slices of the unit's."""

    queries: slice
    keys: slice


@dataclass(frozen=True)
class _Strip:
    """Queries, and the range of keys that any of them sees."""

    queries: slice
    key_start: int
    key_stop: int
    width: int

    def tiles(self) -> Iterator[_Tile]:
        for start in range(self.key_start, self.key_stop, self.width):
            yield _Tile(self.queries, slice(start, min(start + self.width, self.key_stop)))


def _strips(q: Tensor, k: Tensor, scope: Scope) -> list[_Strip]:
    height, width = _tile_size(q.shape[0] * q.shape[1], scope)
    first = scope.first("cpu").min(dim=0).values
    prefix = scope.start - scope.key_start
    strips = []
    for start in range(0, scope.num_queries, height):
        stop = min(start + height, scope.num_queries)
        strips.append(_Strip(slice(start, stop), int(first[start]), prefix + stop, width))
    return strips


def _tile_size(num_heads: int, scope: Scope) -> tuple[int, int]:
    """Return rows and columns of a tile; never an eighth of the square of the row's length."""
    scores = min(max(scope.rows.length**2 // 8, _FEWEST), _MOST) / num_heads
    side = max(int(scores**0.5), 16)
    window = scope.pattern.window
    if window is None or window >= side:
        return side, side
    # One tile a strip: the window and the strip's own tokens.
    height = max(min(int(scores) // (2 * window), window), 16)
    return height, height + window


def _scores(queries: Tensor, k: Tensor, tile: _Tile, scope: Scope, options: Options) -> Tensor:
    """Return scores ``[b, kv heads, group, queries, keys]``, minus infinity where not seen."""
    scores = (queries @ _keys(k, tile).transpose(-1, -2)).mul_(options.scale)
    if options.softcap is not None:
        scores = (scores / options.softcap).tanh_().mul_(options.softcap)
    hidden = _hidden(tile, scope, scores.device)
    return scores if hidden is None else scores.masked_fill_(hidden[:, None, None], float("-inf"))


def _hidden(tile: _Tile, scope: Scope, device: torch.device) -> Tensor | None:
    """Return which keys each query of the tile does not see, ``[b, queries, keys]``."""
    prefix = scope.start - scope.key_start
    rows, keys = tile.queries, tile.keys
    first_on_cpu = scope.first("cpu")[:, rows]
    is_real = scope.is_real_key(device)
    is_before = keys.stop <= prefix + rows.start + 1 and int(first_on_cpu.max()) <= keys.start
    if is_before and is_real is None:
        return None
    places = torch.arange(keys.start, keys.stop, device=device)
    own = torch.arange(prefix + rows.start, prefix + rows.stop, device=device)
    hidden = (places > own[:, None]) | (places < scope.first(device)[:, rows, None])
    return hidden if is_real is None else hidden | ~is_real[:, None, keys]


def _kept(weights: Tensor, tile: _Tile, options: Options) -> Tensor | None:
    """Return the factors of dropout, the same in forward and backward."""
    if not options.dropout:
        return None
    generator = torch.Generator(weights.device)
    generator.manual_seed(hash((options.seed, tile.queries.start, tile.keys.start)) & (2**63 - 1))
    drawn = torch.rand(weights.shape, generator=generator, device=weights.device)
    return (drawn >= options.dropout).to(weights.dtype) / (1 - options.dropout)


def _grouped(x: Tensor, rows: slice, num_kv_heads: int) -> Tensor:
    """Return ``[b, heads, n, dim]`` as ``[b, kv heads, group, rows, dim]`` in at least float32."""
    part = x[:, :, rows].unflatten(1, (num_kv_heads, -1))
    return part.to(torch.promote_types(x.dtype, torch.float32))


def _ungrouped(x: Tensor) -> Tensor:
    return x.flatten(1, 2)


def _keys(x: Tensor, tile: _Tile) -> Tensor:
    """Return the tile's keys or values, ``[b, kv heads, 1, keys, dim]``."""
    return x[:, :, None, tile.keys].to(torch.promote_types(x.dtype, torch.float32))


def _per_head(sinks: Tensor, queries: Tensor) -> Tensor:
    """Return the sinks for every query, ``[b, kv heads, group, rows, 1]``."""
    b, kv_heads, group, rows, _ = queries.shape
    shaped = sinks.to(queries.dtype).view(1, kv_heads, group, 1, 1)
    return shaped.expand(b, kv_heads, group, rows, 1)
