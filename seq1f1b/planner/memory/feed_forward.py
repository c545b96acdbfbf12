"""Tensors of the MLP and of a mixture of experts."""

from seq1f1b.planner.memory.allocator import Block
from seq1f1b.planner.memory.sizes import Sizes
from seq1f1b.planner.memory.tape import Saved, Tape
from seq1f1b.planner.setting import Setting


class FeedForward:
    """The second half of a layer, from the norm's output on."""

    def __init__(self, setting: Setting, tape: Tape) -> None:
        self.setting, self.tape = setting, tape
        a = setting.arguments
        self.keeps_half = (setting.model.gated and not a.bias_swiglu_fusion) or a.squared_relu

    def forward(self, saved: Saved, sizes: Sizes, *, experts: bool) -> None:
        """Keep what the backward needs."""
        if not experts:
            self._hidden(saved, "", sizes.projected, sizes.activated)
            return
        model, tape = self.setting.model, self.tape
        assert model.experts is not None
        scores = 4.0 * sizes.tokens / sizes.shards * model.experts.count
        saved.new("router logits", scores)
        saved.new("routing map", scores)
        permuted = tape.new(sizes.dispatched / self.setting.expert_tensor)
        saved.new("dispatched", sizes.dispatched)
        tape.free(permuted)
        factor = 2 if model.gated else 1
        self._hidden(saved, "expert ", sizes.expert_activated * factor, sizes.expert_activated)
        if model.experts.shared_ffn:
            self._hidden(saved, "shared ", sizes.shared_activated * factor, sizes.shared_activated)
        tape.passing(sizes.dispatched, sizes.dispatched / self.setting.expert_tensor)

    def _hidden(self, saved: Saved, kind: str, projected: float, activated: float) -> None:
        saved.new(f"{kind}projected", projected)
        if self.keeps_half:
            saved.new(f"{kind}half", activated)
        saved.new(f"{kind}activated", activated)

    def backward(self, saved: Saved, sizes: Sizes, gradient: Block, *, experts: bool) -> Block:
        """From the gathered gradient of the output to that of the norm's output.

        ``gradient`` is freed; returns a tensor of all tokens.
        """
        tape = self.tape
        if not experts:
            return self._hidden_backward(
                saved, "", sizes.projected, sizes.activated, gradient, sizes.full
            )
        model = self.setting.model
        assert model.experts is not None
        factor = 2 if model.gated else 1
        activated = sizes.expert_activated
        dispatched = self._hidden_backward(
            saved,
            "expert ",
            activated * factor,
            activated,
            tape.new(sizes.dispatched),
            sizes.dispatched,
        )
        saved.drop("dispatched", "router logits", "routing map")
        tape.passing(sizes.dispatched / self.setting.expert_tensor)
        tape.free(dispatched)
        if model.experts.shared_ffn:
            shared = sizes.shared_activated
            return self._hidden_backward(
                saved, "shared ", shared * factor, shared, gradient, sizes.full
            )
        tape.free_communicated(gradient)
        return tape.new(sizes.full)

    def _hidden_backward(
        self,
        saved: Saved,
        kind: str,
        projected: float,
        activated: float,
        gradient: Block,
        inputs: float,
    ) -> Block:
        tape = self.tape
        behind = tape.new(activated)
        saved.drop(f"{kind}activated")
        tape.free_communicated(gradient)
        before = tape.new(projected)
        tape.free(behind)
        saved.drop(f"{kind}projected", f"{kind}half")
        result = tape.new(inputs)
        tape.free(before)
        return result
