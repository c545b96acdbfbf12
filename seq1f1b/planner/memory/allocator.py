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


Block = tuple[int, int, int]
"""A piece of a segment: its size, the segment's number and the offset there."""


class Allocator:
    """Counts what is allocated and what is reserved, in bytes, on a device without a limit."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._small, self._large = _Pool(), _Pool()
        self._segments: dict[int, int] = {}
        self._num_segments = 0

    def allocate(self, num_bytes: float) -> Block:
        """Take a block for a tensor."""
        size = -(-int(num_bytes) // _ROUND) * _ROUND or _ROUND
        is_small = size <= _SMALL
        pool = self._small if is_small else self._large
        room, segment, offset = pool.take(size) or self._reserve(size)
        rest = room - size
        if rest >= _ROUND if is_small else rest > _SMALL:
            pool.add((rest, segment, offset + size))
        else:
            size = room
        self.allocated += size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return size, segment, offset

    def free(self, block: Block) -> None:
        """Return a block."""
        self.allocated -= block[0]
        is_small = self._segments[block[1]] == _SMALL_SEGMENT
        (self._small if is_small else self._large).merge(block)

    def _reserve(self, size: int) -> Block:
        """Reserve a segment for a request that fits into no free block."""
        if size <= _SMALL:
            room = _SMALL_SEGMENT
        elif size < _LARGE:
            room = _LARGE_SEGMENT
        else:
            room = -(-size // _LARGE_ROUND) * _LARGE_ROUND
        self._num_segments += 1
        self._segments[self._num_segments] = room
        self.reserved += room
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return room, self._num_segments, 0


class _Pool:
    """Free blocks by size, and by both of their ends."""

    def __init__(self) -> None:
        self._by_size: list[Block] = []
        self._starts: dict[tuple[int, int], Block] = {}
        self._ends: dict[tuple[int, int], Block] = {}

    def take(self, size: int) -> Block | None:
        """Remove the smallest block of at least ``size`` bytes, the oldest segment's first."""
        index = bisect_left(self._by_size, (size, 0, 0))
        if index == len(self._by_size):
            return None
        block = self._by_size.pop(index)
        room, segment, offset = block
        del self._starts[segment, offset]
        del self._ends[segment, offset + room]
        return block

    def add(self, block: Block) -> None:
        """Add a block that has no free neighbour."""
        size, segment, offset = block
        insort(self._by_size, block)
        self._starts[segment, offset] = block
        self._ends[segment, offset + size] = block

    def remove(self, block: Block) -> None:
        """Remove a free block."""
        size, segment, offset = block
        del self._by_size[bisect_left(self._by_size, block)]
        del self._starts[segment, offset]
        del self._ends[segment, offset + size]

    def merge(self, block: Block) -> None:
        """Add a block, together with the free ones on either side of it."""
        size, segment, offset = block
        before = self._ends.get((segment, offset))
        if before is not None:
            self.remove(before)
            size, offset = size + before[0], before[2]
        after = self._starts.get((segment, offset + size))
        if after is not None:
            self.remove(after)
            size += after[0]
        self.add((size, segment, offset))
