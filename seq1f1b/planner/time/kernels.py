"""Seconds of kernels and collectives on a device, from its measured curves."""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any

from seq1f1b.planner.gpu import Curves, Gpu

_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6
_NEAREST = 4
_Points = Sequence[tuple[float, float]]


class Kernels:
    """Times of one kind of device in nodes of ``gpus_per_node``."""

    def __init__(self, gpu: Gpu, gpus_per_node: int | None = None) -> None:
        self.gpu = gpu
        self.gpus_per_node = gpus_per_node or gpu.gpus_per_node
        self.curves = gpu.kernel_curves
        self._products = _by_shape(self.curves)
        self._forward = _AttentionRates(self.curves.attention, self.curves.prefix_scaling)
        backward = self.curves.backward_points
        self._backward = _AttentionRates(backward, self.curves.prefix_scaling) if backward else None
        self._tables: defaultdict[Hashable, dict[Any, Any]] = defaultdict(dict)
        self.matrix_product = cache(self._matrix_product)
        self.attention = cache(self._attention)
        self.collective = cache(self._collective)

    def known(self, *key: Hashable) -> dict[Any, Any]:
        """Return a table of times that settings with the same layers share."""
        return self._tables[key]

    def _matrix_product(self, rows: float, columns: float, inner: float) -> float:
        """Return the time of [rows, inner] x [inner, columns]; rows fill whole tiles."""
        if not rows or not columns or not inner:
            return 0.0
        filled = -(-rows // self.curves.tile) * self.curves.tile
        weights = self._nearest(columns, inner)
        rate = sum(weight * _interpolate(points, filled) for weight, points in weights)
        return 2.0 * filled * columns * inner / (rate * _TERA * self.gpu.curve_scale)

    def _nearest(self, columns: float, inner: float) -> list[tuple[float, _Points]]:
        """Return curves of the shapes nearest to this one, with weights that add up to 1."""
        if (columns, inner) in self._products:
            return [(1.0, self._products[columns, inner])]
        distances = sorted(
            (math.hypot(math.log2(columns / n), math.log2(inner / k)), n, k)
            for n, k in self._products
        )[:_NEAREST]
        shares = [(1.0 / distance**2, self._products[n, k]) for distance, n, k in distances]
        total = sum(share for share, _ in shares)
        return [(share / total, points) for share, points in shares]

    def _attention(
        self, own: float, before: float, heads: float, groups: float, dim: float, backward: bool
    ) -> float:
        """Return the time of causal attention from ``own`` tokens to themselves and ``before``."""
        operations = 4.0 * heads * dim * (own * before + own * (own + 1) / 2)
        if not backward:
            rate = self._forward.rate(own, before, heads, groups)
        elif self._backward is not None:
            operations, rate = 2.5 * operations, self._backward.rate(own, before, heads, groups)
        else:
            rate = self._forward.rate(own, before, heads, groups)
            operations, rate = 2.5 * operations, rate * self.curves.attention_backward.value
        return operations / (rate * _TERA * self.gpu.curve_scale)

    def _collective(self, kind: str, num_bytes: float, ranks: int, stride: int = 1) -> float:
        """Return the time of a collective of ``ranks`` ranks that lie ``stride`` apart.

        ``num_bytes`` is the whole tensor: what is gathered, or what is reduced. Where no curve was
        measured, or the ranks are on several nodes, a ring at the link's bandwidth.
        """
        if ranks < 2 or not num_bytes:
            return 0.0
        in_node = ranks * stride <= self.gpus_per_node
        points = self.curves.collectives.get(kind, ())
        sizes = sorted({count for _, count, _ in points})
        if in_node and sizes:
            count = next((size for size in sizes if size >= ranks), sizes[-1])
            curve = [(size, size / ms) for size, number, ms in points if number == count]
            return num_bytes / _interpolate(curve, num_bytes) * 1e-3
        rounds = 2 if kind == "all_reduce" else 1
        moved = rounds * num_bytes * (ranks - 1) / ranks
        return moved / self.bandwidth(in_node) + rounds * (ranks - 1) * self.latency

    def bandwidth(self, in_node: bool) -> float:
        """Return bytes per second one way between two devices."""
        gpu = self.gpu
        rate = gpu.link_gb_s if in_node else gpu.network_gb_s
        return rate.value * _GIGA * gpu.network_efficiency.value

    @property
    def latency(self) -> float:
        """Seconds before a message arrives."""
        return self.gpu.latency_us.value * _MICRO

    def elementwise(self, num_bytes: float) -> float:
        """Return the time of kernels that read and write this many bytes."""
        if self.curves.elementwise:
            return num_bytes / (_interpolate(self.curves.elementwise, num_bytes) * _GIGA)
        gpu = self.gpu
        return num_bytes / (gpu.memory_gb_s.value * _GIGA * gpu.memory_efficiency.value)


class _AttentionRates:
    """Rates in TFLOP/s by own tokens, prefix, heads, and whether heads share keys."""

    def __init__(
        self, points: Sequence[tuple[int, int, int, int, int, float]], scaling: str
    ) -> None:
        self.scaling = scaling
        self.curves: Mapping[tuple[bool, float], Mapping[int, _Points]]
        curves: defaultdict[tuple[bool, float], defaultdict[int, list[tuple[float, float]]]]
        curves = defaultdict(lambda: defaultdict(list))
        for own, before, heads, groups, _, rate in points:
            curves[groups < heads, before / own][heads].append((own, rate))
        self.curves = {
            key: {heads: sorted(curve) for heads, curve in by_heads.items()}
            for key, by_heads in curves.items()
        }

    def rate(self, own: float, before: float, heads: float, groups: float) -> float:
        """Return the rate of a sub-sequence of ``own`` tokens behind ``before`` others."""
        shares = groups < heads if any(shared for shared, _ in self.curves) else False
        ratios = sorted(ratio for shared, ratio in self.curves if shared == shares)
        if not ratios:
            shares = not shares
            ratios = sorted(ratio for shared, ratio in self.curves if shared == shares)
        if len(ratios) == 1:
            return _at(self.curves[shares, ratios[0]], self._length(own, before), heads)
        measured = [(1.0 + ratio, _at(self.curves[shares, ratio], own, heads)) for ratio in ratios]
        return _interpolate(measured, 1.0 + before / own)

    def _length(self, own: float, before: float) -> float:
        """Return the length of a sequence without a prefix that runs at the same rate."""
        if self.scaling == "own":
            return own
        total = own + before
        return total if self.scaling == "total" else math.sqrt(own * total)


def _at(by_heads: Mapping[int, _Points], length: float, heads: float) -> float:
    """Return the rate for ``heads`` and ``length``; beyond the longest, more heads stand for it.

    Heads times tokens decide how well a device is filled, so twice the length at a number of heads
    runs as the longest measured length does at twice the heads.
    """
    longest = max(length for curve in by_heads.values() for length, _ in curve)
    if length > longest:
        heads, length = heads * length / longest, longest
    return _interpolate(
        [(count, _interpolate(curve, length)) for count, curve in sorted(by_heads.items())], heads
    )


def _by_shape(curves: Curves) -> dict[tuple[float, float], _Points]:
    shapes: defaultdict[tuple[float, float], list[tuple[float, float]]] = defaultdict(list)
    for rows, columns, inner, rate in curves.gemm:
        shapes[columns, inner].append((rows, rate))
    return {shape: sorted(points) for shape, points in shapes.items()}


def _interpolate(points: _Points, x: float) -> float:
    """Interpolate linearly in log x; constant beyond both ends."""
    places = [place for place, _ in points]
    index = bisect_left(places, x)
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[index - 1], points[index]
    share = math.log(x / left) / math.log(right / left)
    return low + share * (high - low)
