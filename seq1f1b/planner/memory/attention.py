"""Tensors of attention: projections, rotary positions, the kernel, and the KV carry."""

from dataclasses import dataclass, field

from seq1f1b.planner.memory.allocator import Block
from seq1f1b.planner.memory.sizes import Sizes
from seq1f1b.planner.memory.tape import Saved, Tape
from seq1f1b.planner.setting import Setting


@dataclass
class Carry:
    """Keys and values of one layer and micro-batch, and their gradients; size and block of each.

    own: keys and values of the first sub-sequence where nothing is concatenated yet.
    """

    buffers: list[tuple[float, Block]] = field(default_factory=list)
    gradients: list[tuple[float, Block]] = field(default_factory=list)


class Attention:
    """Attention of one layer."""

    def __init__(self, setting: Setting, tape: Tape) -> None:
        self.setting, self.tape = setting, tape
        runtime, arguments = tape.runtime, setting.arguments
        self.copies = runtime.attention_inputs == "copies"
        self.concatenates = runtime.kv_carry == "concatenated"
        self.rotary = setting.model.rotary
        fused = arguments.apply_rope_fusion and arguments.transformer_impl != "local"
        self.rotary_tables = runtime.rotary_tables == "per_layer" or not fused
        self.has_carry = setting.num_splits > 1
        # flash kernels for CUDA add up query gradients in fp32
        self.accumulates = not runtime.host

    def forward(self, saved: Saved, sizes: Sizes, carry: Carry, part: int) -> None:
        """From the norm's output to attention's output, which is kept."""
        if self.setting.model.latent is not None:
            self._project_latent(saved, sizes)
        else:
            self._project(saved, sizes)
        self.attend(saved, sizes, carry, part)

    def _project(self, saved: Saved, sizes: Sizes) -> None:
        tape = self.tape
        whole = sizes.query + sizes.key + sizes.value
        mixed = tape.new(whole)
        keeps_mixed = self.setting.model.qk_norm
        if self.setting.model.qk_norm:
            # norms of queries and keys keep their inputs
            saved.adopt("mixed", whole, mixed)
            normed = [tape.new(sizes.query), tape.new(sizes.key)]
        if self.rotary:
            self._rotate(saved, sizes, "query", sizes.query)
            self._rotate(saved, sizes, "key", sizes.key)
        elif self.copies or keeps_mixed or self.has_carry:
            saved.new("query", sizes.query)
            saved.new("key", sizes.key)
        if self.setting.model.qk_norm:
            tape.free(*normed)
        if self.copies:
            saved.new("value", sizes.value)
            tape.free(mixed)
        elif not keeps_mixed:
            saved.adopt("mixed", whole, mixed)

    def _rotate(self, saved: Saved, sizes: Sizes, name: str, size: float) -> None:
        """Turn queries or keys by their position: one kernel, or a handful of operations."""
        tape = self.tape
        if not self.rotary_tables:
            saved.new(name, size)
            return
        source = tape.new(size) if self.copies and name == "query" else None
        saved.new(f"cosines of {name}", sizes.rotary)
        turned, rotated = tape.new(size), tape.new(size)
        saved.new(f"sines of {name}", sizes.rotary)
        other = tape.new(size)
        tape.free(rotated)
        total = tape.new(size)
        tape.free(turned, other)
        saved.new(name, size)
        tape.free(total)
        if source is not None:
            tape.free(source)

    def _project_latent(self, saved: Saved, sizes: Sizes) -> None:
        """Compress, normalise and expand (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
        latent = self.setting.model.latent
        assert latent is not None
        tape, model = self.tape, self.setting.model
        row = sizes.tokens * sizes.element / sizes.shards
        if latent.query_rank is not None:
            saved.new("compressed query", row * latent.query_rank)
            saved.new("normed query", row * latent.query_rank)
        saved.new("compressed keys", row * (latent.kv_rank + latent.rotary))
        saved.new("normed keys", row * latent.kv_rank)
        query = tape.new(sizes.query)
        expanded = tape.new(sizes.per_head(model.heads * (latent.head + latent.value)))
        if self.rotary_tables:
            for name in ("query", "key"):
                saved.new(f"cosines of {name}", sizes.rotary)
                saved.new(f"sines of {name}", sizes.rotary)
        for name, size in (("query", sizes.query), ("key", sizes.key), ("value", sizes.value)):
            saved.new(name, size)
        tape.free(query, expanded)

    def attend(self, saved: Saved, sizes: Sizes, carry: Carry, part: int) -> None:
        """Write keys and values into the carry and run the kernel."""
        if self.has_carry:
            if self.concatenates:
                self._concatenate(sizes, carry, part)
            else:
                self._write(saved, carry)
        saved.new("attended", sizes.attended)
        saved.new("log-sum-exp", sizes.log_sum_exp)

    def _concatenate(self, sizes: Sizes, carry: Carry, part: int) -> None:
        if part == 0:
            return
        tokens = sum(self.setting.tokens(index) for index in range(part + 1))
        longer = Sizes(self.setting, tokens)
        old = carry.buffers
        carry.buffers = [(size, self.tape.new(size)) for size in (longer.key, longer.value)]
        for size, _ in carry.buffers:
            self.tape.keep(size)
        self._release(old)

    def _write(self, saved: Saved, carry: Carry) -> None:
        if not carry.buffers:
            tokens = sum(self.setting.tokens(index) for index in range(self.setting.num_splits))
            whole = Sizes(self.setting, tokens)
            carry.buffers = [
                (size, self.tape.take_pooled(size)) for size in (whole.key, whole.value)
            ]
        if not self.setting.model.qk_norm:
            saved.drop("mixed")
        saved.drop("key", "value")

    def _release(self, buffers: list[tuple[float, Block]]) -> None:
        for size, block in buffers:
            if self.concatenates:
                self.tape.keep(-size)
                self.tape.free(block)
            else:
                self.tape.return_pooled(size, block)

    def backward(self, saved: Saved, sizes: Sizes, carry: Carry, part: int, output: Block) -> Block:
        """From the gradient ``output`` of attention's output to that of the norm's output.

        ``output`` is freed; returns the gradient as the projection's backward leaves it.
        """
        tape = self.tape
        query = tape.new(sizes.query)
        accumulator = tape.new(sizes.query * 4 / sizes.element) if self.accumulates else None
        gradients = self._carried_gradients(sizes, carry, part)
        if accumulator is not None:
            tape.free(accumulator)
        tape.free(output)
        saved.drop("query", "key", "value", "attended", "log-sum-exp")
        if self.rotary:
            turned, other = tape.new(sizes.query), tape.new(sizes.query)
            tape.free(query, turned, other)
        else:
            tape.free(query)
        for name in ("query", "key"):
            saved.drop(f"cosines of {name}", f"sines of {name}")
        if self.setting.model.latent is not None:
            return self._latent_backward(saved, sizes, gradients)
        mixed = tape.new(sizes.query + sizes.key + sizes.value)
        tape.free(*gradients)
        saved.drop("mixed")
        tape_full = tape.new(sizes.full)
        tape.free(mixed)
        return tape_full

    def _latent_backward(self, saved: Saved, sizes: Sizes, gradients: list[Block]) -> Block:
        latent, model, tape = self.setting.model.latent, self.setting.model, self.tape
        assert latent is not None
        expanded = tape.new(sizes.per_head(model.heads * (latent.head + latent.value)))
        tape.free(*gradients)
        compressed = tape.new(sizes.tokens * latent.kv_rank * sizes.element)
        tape.free(expanded, compressed)
        saved.drop("compressed query", "normed query", "compressed keys", "normed keys")
        return tape.new(sizes.full)

    def _carried_gradients(self, sizes: Sizes, carry: Carry, part: int) -> list[Block]:
        """Run the kernel's backward over the prefix; return gradients of own keys and values."""
        tape = self.tape
        if not self.has_carry:
            return [tape.new(sizes.key), tape.new(sizes.value)]
        tokens = sum(self.setting.tokens(index) for index in range(part + 1))
        prefix = Sizes(self.setting, tokens)
        if self.concatenates:
            old = carry.gradients
            carry.gradients = [(size, tape.new(size)) for size in (prefix.key, prefix.value)]
            for size, _ in carry.gradients:
                tape.keep(size)
            self._release(old)
            tape.passing(sizes.key, sizes.value)
            own: list[Block] = []
        else:
            if part == self.setting.num_splits - 1:
                before = Sizes(self.setting, tokens - sizes.tokens)
                wider = max(4, sizes.element) / sizes.element
                carry.gradients = [
                    (size * wider, tape.take_pooled(size * wider))
                    for size in (before.key, before.value)
                ]
            own = [tape.new(prefix.key), tape.new(prefix.value)]
        if part == 0:
            self._release(carry.buffers)
            self._release(carry.gradients)
            carry.buffers, carry.gradients = [], []
        return own
