"""Tensors of one transformer layer, forward and backward, with what is computed anew."""

from seq1f1b.planner.memory.allocator import Block
from seq1f1b.planner.memory.attention import Attention, Carry
from seq1f1b.planner.memory.feed_forward import FeedForward
from seq1f1b.planner.memory.sizes import Sizes
from seq1f1b.planner.memory.tape import Saved, Tape
from seq1f1b.planner.setting import Setting

_MODULES = {
    "core_attn": ("log-sum-exp",),
    "layernorm": ("attention input", "MLP input"),
    "mlp": ("projected", "half", "activated"),
    "moe_act": ("expert activated",),
    "mla_up_proj": ("query", "key", "value"),
    "shared_experts": ("shared projected", "shared half", "shared activated"),
    "moe": (
        "router logits",
        "routing map",
        "dispatched",
        "expert projected",
        "expert half",
        "expert activated",
        "shared projected",
        "shared half",
        "shared activated",
    ),
}
"""What a recomputed module does not keep. Attention's output stays as the projection's input."""


class Layer:
    """One transformer layer of a chunk."""

    def __init__(self, setting: Setting, tape: Tape) -> None:
        self.setting, self.tape = setting, tape
        self.attention = Attention(setting, tape)
        self.feed_forward = FeedForward(setting, tape)
        self.forgotten = [
            names for module, names in _MODULES.items() if setting.recompute.has(module)
        ]
        model, runtime = setting.model, tape.runtime
        self.normed_too = model.rms_norm and runtime.composed_rms_norm
        has_mask = runtime.dropout_masks == "always" or setting.arguments.hidden_dropout > 0
        self.mask_bytes = 0
        if has_mask:
            self.mask_bytes = setting.element_bytes if runtime.dropout_masks == "elements" else 1

    def forward(
        self, saved: Saved, sizes: Sizes, carry: Carry, part: int, *, experts: bool
    ) -> Block:
        """Run the layer on an input that the caller keeps; return the output, not yet kept."""
        self._norm(saved, sizes, "attention")
        self.attention.forward(saved, sizes, carry, part)
        middle = self._add(saved, sizes, "attention mask")
        saved.adopt("middle", sizes.residual, middle)
        self._norm(saved, sizes, "MLP")
        self.feed_forward.forward(saved, sizes, experts=experts)
        output = self._add(saved, sizes, "MLP mask")
        for names in self.forgotten:
            saved.forget(*names)
        return output

    def _norm(self, saved: Saved, sizes: Sizes, name: str) -> None:
        tape = self.tape
        saved.new(f"{name} statistics", 8.0 * sizes.tokens / sizes.shards)
        if self.normed_too:
            saved.new(f"{name} normed", sizes.residual)
        saved.new(f"{name} input", sizes.residual)
        if sizes.shards > 1:
            tape.gather(sizes.full)

    def _add(self, saved: Saved, sizes: Sizes, mask: str) -> Block:
        """Reduce a branch's output over tensor-parallel ranks and add it to the residual stream."""
        tape = self.tape
        branch = tape.new(sizes.full)
        if sizes.shards > 1:
            scattered = tape.new(sizes.residual)
            tape.free_communicated(branch)
            branch = scattered
        if self.mask_bytes:
            saved.new(mask, sizes.mask * self.mask_bytes)
        total = tape.new(sizes.residual)
        tape.free_communicated(branch)
        return total

    def backward(
        self, saved: Saved, sizes: Sizes, carry: Carry, part: int, gradient: Block, *, experts: bool
    ) -> Block:
        """From the gradient of the output to that of the input; ``gradient`` is freed."""
        tape = self.tape
        saved.remember()
        # MLP
        branch, full = self._branch_gradient(saved, sizes, "MLP mask")
        inner = self.feed_forward.backward(saved, sizes, full, experts=experts)
        if branch is not None:
            tape.free_communicated(branch)
        gradient = self._norm_backward(saved, sizes, "MLP", inner, gradient)
        # attention
        branch, full = self._branch_gradient(saved, sizes, "attention mask")
        attended = tape.new(sizes.attended)
        tape.free_communicated(full)
        if branch is not None:
            tape.free_communicated(branch)
        inner = self.attention.backward(saved, sizes, carry, part, attended)
        return self._norm_backward(saved, sizes, "attention", inner, gradient)

    def _branch_gradient(self, saved: Saved, sizes: Sizes, mask: str) -> tuple[Block | None, Block]:
        """Return the gradient of a branch's output: this rank's share, if any, and the whole."""
        branch = self.tape.new(sizes.residual)
        saved.drop(mask)
        if sizes.shards == 1:
            return None, branch
        return branch, self.tape.new(sizes.full)

    def _norm_backward(
        self, saved: Saved, sizes: Sizes, name: str, inner: Block, gradient: Block
    ) -> Block:
        """Reduce the gradient of a norm's output, go through the norm, and add up both ways."""
        tape = self.tape
        if sizes.shards > 1:
            tape.gather(sizes.full)
            scattered = tape.new(sizes.residual)
            tape.free_communicated(inner)
            inner = scattered
        tape.free_communicated(saved.pop(f"{name} input"))
        behind = tape.new(sizes.residual)
        tape.free_communicated(inner)
        if name == "MLP":
            saved.drop("middle")
        saved.drop(f"{name} statistics", f"{name} normed")
        total = tape.new(sizes.residual)
        tape.free(behind, gradient)
        return total
