"""The rules of torch's caching allocator, on sizes alone.

From c10/cuda/CUDACachingAllocator.cpp: a request is rounded up to 512 bytes; requests of at most
1 MiB share segments of 2 MiB, others below 10 MiB segments of 20 MiB, larger ones get a segment of
their own size rounded up to 2 MiB. The smallest free block that is large enough is taken, and split
where the rest is large enough to be used; a freed block merges with free neighbours. Segments stay
reserved: the rule that returns them to a device that has run out is left out.
"""

from bisect import bisect_left, insort

MIB = 1 << 20
GIB = 1 << 30
_ROUND = 512
_SMALL, _SMALL_SEGMENT = MIB, 2 * MIB
_LARGE, _LARGE_SEGMENT, _LARGE_ROUND = 10 * MIB, 20 * MIB, 2 * MIB


_SEGMENT = 1 << 48
"""Addresses from the start of one segment to the next, more than any segment has bytes."""


class Allocator:
    """Counts what is allocated and what is reserved, in bytes, on a device without a limit."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._small, self._large = _Pool(_ROUND), _Pool(_SMALL + _ROUND)
        self._num_segments = 0

    def allocate(self, num_bytes: float) -> "Block":
        """Take a block for a tensor."""
        size = -(-int(num_bytes) // _ROUND) * _ROUND or _ROUND
        pool = self._small if size <= _SMALL else self._large
        block = pool.take(size)
        if block is None:
            pool.put(self._reserve(size), self._num_segments * _SEGMENT)
            block = pool.take(size)
            assert block is not None
        self.allocated += block[0]
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: "Block") -> None:
        """Return a block."""
        size, start, pool = block
        self.allocated -= size
        pool.put(size, start)

    def _reserve(self, size: int) -> int:
        """Reserve a segment for a request that fits into no free block; return its size."""
        if size <= _SMALL:
            room = _SMALL_SEGMENT
        elif size < _LARGE:
            room = _LARGE_SEGMENT
        else:
            room = -(-size // _LARGE_ROUND) * _LARGE_ROUND
        self._num_segments += 1
        self.reserved += room
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return room


class _Pool:
    """Free blocks by size, and by both of their ends.

    ``least_rest``: what a block must have beyond a request to be split.
    """

    def __init__(self, least_rest: int) -> None:
        self._least_rest = least_rest
        self._by_size: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}
        self._starts: dict[int, int] = {}

    def take(self, size: int) -> "Block | None":
        """Take the smallest block of at least ``size`` bytes, the oldest segment's first."""
        index = bisect_left(self._by_size, (size, 0))
        if index == len(self._by_size):
            return None
        room, start = self._by_size.pop(index)
        del self._sizes[start]
        rest = room - size
        if rest < self._least_rest:
            del self._starts[start + room]
            return room, start, self
        end = start + size
        insort(self._by_size, (rest, end))
        self._sizes[end] = rest
        self._starts[end + rest] = end
        return size, start, self

    def put(self, size: int, start: int) -> None:
        """Add a block, together with the free ones on either side of it."""
        end = start + size
        before = self._starts.pop(start, None)
        if before is not None:
            del self._by_size[bisect_left(self._by_size, (start - before, before))]
            start = before
        after = self._sizes.pop(end, None)
        if after is not None:
            del self._by_size[bisect_left(self._by_size, (after, end))]
            end += after
        insort(self._by_size, (end - start, start))
        self._sizes[start] = end - start
        self._starts[end] = start


Block = tuple[int, int, _Pool]
"""A piece of a segment: its size, its address, and the pool that it returns to."""
