"""Tensors that come and go: on top of the allocator, what autograd keeps and what is blocked."""

from collections import defaultdict

from seq1f1b.planner.memory.allocator import Allocator, Block
from seq1f1b.planner.runtime import Runtime


class Tape:
    """Allocates and frees tensors of one stage, and counts what autograd and the carry keep.

    ``kept`` counts bytes of tensors that wait for a backward, without the allocator's rounding;
    ``is_forward`` tells whether a forward runs.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.allocator = Allocator()
        self.runtime = runtime
        self.is_forward = True
        self.kept = self.peak_kept = 0.0
        self._blocked: list[Block] = []
        self._pooled: defaultdict[float, list[Block]] = defaultdict(list)
        self._gathered: Block | None = None

    def new(self, num_bytes: float) -> Block:
        """Allocate a tensor."""
        return self.allocator.allocate(num_bytes)

    def free(self, *blocks: Block) -> None:
        """Free tensors."""
        for block in blocks:
            self.allocator.free(block)

    def free_communicated(self, block: Block) -> None:
        """Free a tensor that a tensor-parallel collective has used on its own stream."""
        blocked = self.runtime.collective_buffers
        if blocked == "always" or (blocked == "forward" and self.is_forward):
            self._blocked.append(block)
        else:
            self.allocator.free(block)

    def end_action(self) -> None:
        """Unblock what collectives have used."""
        self.free(*self._blocked)
        self._blocked.clear()

    def passing(self, *sizes: float) -> None:
        """Allocate temporaries that live at the same time, and free them again."""
        self.free(*[self.new(size) for size in sizes])

    def gather(self, num_bytes: float) -> None:
        """Use Megatron's one buffer for gathered inputs, which grows to the largest of them."""
        if self._gathered is None or self._gathered[0] < num_bytes:
            old, self._gathered = self._gathered, self.new(num_bytes)
            if old is not None:
                self.free(old)

    def keep(self, num_bytes: float) -> None:
        """Count bytes that stay for the backward; negative when they go."""
        self.kept += num_bytes
        if self.kept > self.peak_kept:
            self.peak_kept = self.kept

    def take_pooled(self, num_bytes: float) -> Block:
        """Take a buffer from the pool of the KV carry, which keeps what is returned to it."""
        self.keep(num_bytes)
        free = self._pooled[num_bytes]
        return free.pop() if free else self.new(num_bytes)

    def return_pooled(self, num_bytes: float, block: Block) -> None:
        """Return a buffer to the pool."""
        self.keep(-num_bytes)
        self._pooled[num_bytes].append(block)


class Saved:
    """Tensors that one layer keeps for its backward, by name."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._blocks: dict[str, Block] = {}
        self._sizes: dict[str, float] = {}
        self._forgotten: dict[str, float] = {}

    def new(self, name: str, num_bytes: float) -> Block:
        """Allocate a tensor and keep it."""
        block = self._tape.new(num_bytes)
        self.adopt(name, num_bytes, block)
        return block

    def adopt(self, name: str, num_bytes: float, block: Block) -> None:
        """Keep a tensor that exists."""
        self._blocks[name], self._sizes[name] = block, num_bytes
        self._tape.keep(num_bytes)

    def pop(self, name: str) -> Block:
        """Stop keeping a tensor, which is not freed yet."""
        self._tape.keep(-self._sizes.pop(name))
        return self._blocks.pop(name)

    def drop(self, *names: str) -> None:
        """Free tensors, of those names that are kept."""
        for name in names:
            if name in self._blocks:
                self._tape.free(self.pop(name))

    def forget(self, *names: str) -> None:
        """Free tensors that the backward computes anew."""
        self._forgotten |= {name: self._sizes[name] for name in names if name in self._sizes}
        self.drop(*names)

    def remember(self) -> None:
        """Compute what was forgotten anew."""
        for name, size in self._forgotten.items():
            self.new(name, size)
        self._forgotten.clear()

    def drop_all(self) -> None:
        """Free everything."""
        self.drop(*list(self._blocks))
