"""The KV carry: keys and values of earlier sub-sequences, with their gradient accumulators."""

from collections import defaultdict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from seq1f1b.sequence import SubSequence

_BufferKey = tuple[tuple[int, ...], torch.dtype, torch.device]


class LayerCarry:
    """What one attention layer carries through the sub-sequences of one micro-batch.

    ``keys`` is ``[total, b, kv heads, k dim]``, ``values`` ``[total, b, kv heads, v dim]``: one
    buffer each, as long as the sequence, into which every sub-sequence writes at its own offset.
    Writing twice is harmless, so a recomputed forward needs no special case. Autograd never saves
    these buffers; the backward reads them again, and nothing before it overwrites a prefix.
    """

    def __init__(
        self, pool: "CarryPool", keys: Tensor, values: Tensor, *, reuse: bool = True
    ) -> None:
        self._pool = pool
        self._reuse = reuse
        self.keys = keys
        self.values = values
        self._key_gradients: Tensor | None = None
        self._value_gradients: Tensor | None = None

    def write(self, part: SubSequence, keys: Tensor, values: Tensor) -> None:
        """Store the sub-sequence's own keys and values, ``[part.length, b, kv heads, dim]``."""
        self.keys[part.start : part.stop].copy_(keys.detach())
        self.values[part.start : part.stop].copy_(values.detach())

    def add_before(self, part: SubSequence, keys: Tensor, values: Tensor) -> None:
        """Add the gradients that ``part`` has for all tokens before it, in one pass each.

        The accumulators are at least float32. They come with the last sub-sequence's backward, the
        first to come, and are as long as the prefix that it attends to.
        """
        if self._key_gradients is None or self._value_gradients is None:
            self._key_gradients = self._accumulator(self.keys, part.start).copy_(keys)
            self._value_gradients = self._accumulator(self.values, part.start).copy_(values)
        else:
            self._key_gradients[: part.start].add_(keys)
            self._value_gradients[: part.start].add_(values)

    def gradients_of(self, part: SubSequence) -> tuple[Tensor, Tensor] | None:
        """Return what later sub-sequences added for the tokens of ``part``; None for the last."""
        if part.is_last or self._key_gradients is None or self._value_gradients is None:
            return None
        rows = slice(part.start, part.stop)
        return self._key_gradients[rows], self._value_gradients[rows]

    def release(self) -> None:
        """Give all buffers back to the pool."""
        for buffer in (self.keys, self.values, self._key_gradients, self._value_gradients):
            if buffer is not None:
                self._pool.give_back(buffer, reuse=self._reuse)
        self._key_gradients = self._value_gradients = None

    def _accumulator(self, like: Tensor, num_tokens: int) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = num_tokens, *like.shape[1:]
        return self._pool.take(shape, dtype, like.device, reuse=self._reuse)


class CarryPool:
    """Buffers of the KV carry, kept and handed out again from one micro-batch to the next.

    bytes_in_use, peak_bytes: of buffers that are handed out. bytes_held: of all that exist.
    on_take: called, if set, whenever a buffer has been handed out.
    """

    def __init__(self) -> None:
        self._free: defaultdict[_BufferKey, list[Tensor]] = defaultdict(list)
        self._carries: defaultdict[Hashable, dict[Hashable, LayerCarry]] = defaultdict(dict)
        self._asked_for: set[_BufferKey] = set()
        self.bytes_in_use = 0
        self.bytes_held = 0
        self.peak_bytes = 0
        self.on_take: Callable[[], None] | None = None

    def carry(
        self,
        micro_batch: Hashable,
        layer: Hashable,
        total: int,
        keys: Tensor,
        values: Tensor,
        *,
        reuse: bool = True,
    ) -> LayerCarry:
        """Return the carry of ``layer`` for ``micro_batch``, made on first use.

        ``total`` is the length of the micro-batch's sequence; ``keys`` and ``values`` are those of
        any sub-sequence, ``[n, b, kv heads, dim]``: they give shape, type and device. Without
        ``reuse`` the buffers are not kept: no later one is likely to have their length.
        """
        carries = self._carries[micro_batch]
        if layer not in carries:
            carries[layer] = LayerCarry(
                self,
                self.take((total, *keys.shape[1:]), keys.dtype, keys.device, reuse=reuse),
                self.take((total, *values.shape[1:]), values.dtype, values.device, reuse=reuse),
                reuse=reuse,
            )
        return carries[layer]

    def release(self, micro_batch: Hashable) -> None:
        """Take back every buffer of ``micro_batch``; its first sub-sequence's backward is done."""
        for carry in self._carries.pop(micro_batch, {}).values():
            carry.release()

    def trim(self) -> None:
        """Free the buffers of shapes that nothing asked for since the last call.

        If no buffer was asked for that is worth keeping, all are kept for a step that needs them.
        """
        if not self._asked_for:
            return
        for key in self._free.keys() - self._asked_for:
            self.bytes_held -= sum(buffer.nbytes for buffer in self._free.pop(key))
        self._asked_for.clear()

    def drop(self) -> None:
        """Forget every carry of a step that failed; its buffers are not used again."""
        self._carries.clear()
        self.bytes_held -= self.bytes_in_use
        self.bytes_in_use = 0

    def take(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        reuse: bool = True,
    ) -> Tensor:
        """Hand out an uninitialised buffer; with ``reuse`` its shape is worth keeping."""
        if reuse:
            self._asked_for.add((shape, dtype, device))
        free = self._free[shape, dtype, device]
        if free:
            buffer = free.pop()
        else:
            buffer = torch.empty(shape, dtype=dtype, device=device)
            self.bytes_held += buffer.nbytes
        self.bytes_in_use += buffer.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes_in_use)
        if self.on_take is not None:
            self.on_take()
        return buffer

    def give_back(self, buffer: Tensor, *, reuse: bool = True) -> None:
        """Take back a buffer that was handed out; keep it for the next only with ``reuse``."""
        if reuse:
            self._free[tuple(buffer.shape), buffer.dtype, buffer.device].append(buffer)
        else:
            self.bytes_held -= buffer.nbytes
        self.bytes_in_use -= buffer.nbytes

    def check_whole(self) -> None:
        """Assert that nothing is handed out any more, as it must be at the end of every step."""
        assert not self._carries, f"KV carry of {sorted(map(str, self._carries))} never released"
        assert self.bytes_in_use == 0, f"{self.bytes_in_use} bytes of KV carry never given back"

    def reset_peak(self) -> None:
        """Start a new measurement of ``peak_bytes``."""
        self.peak_bytes = self.bytes_in_use
