"""One stage's memory through a step: every tensor of its schedule, through the allocator."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from seq1f1b.planner.layout import ChunkLayers
from seq1f1b.planner.memory.allocator import Block
from seq1f1b.planner.memory.attention import Carry
from seq1f1b.planner.memory.layer import Layer
from seq1f1b.planner.memory.parameters import static_sizes
from seq1f1b.planner.memory.sizes import Sizes
from seq1f1b.planner.memory.tape import Saved, Tape
from seq1f1b.planner.runtime import Runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.schedule import Action, Kind


@dataclass(frozen=True)
class StageMemory:
    """Peaks of one rank of a stage, in bytes.

    static: parameters, gradients and optimizer states. allocated: what tensors take at most, with
    static. reserved: what the allocator holds at most. activations: what autograd and the KV carry
    keep at most.
    """

    static: float
    allocated: float
    reserved: float
    activations: float


def trace_stage(
    setting: Setting,
    runtime: Runtime,
    stage: int,
    actions: Sequence[Action],
    *,
    num_steps: int = 2,
    static: Sequence[float] | None = None,
) -> StageMemory:
    """Follow the tensors of ``actions``, the stage's part of a schedule, through ``num_steps``.

    The second step starts with the segments of the first. static: bytes of each tensor that is
    there all the time; parameters, gradients and optimizer states unless given.
    """
    sizes = static_sizes(setting, stage) if static is None else static
    run = _StageTrace(setting, runtime, stage, sizes)
    for _ in range(num_steps):
        for action in actions:
            run.run(action)
        assert not run.live, f"{len(run.live)} sub-sequences never went back"
        assert abs(run.tape.kept) < 1, f"{run.tape.kept} bytes are kept after a step"
    allocator = run.tape.allocator
    return StageMemory(
        static=run.static,
        allocated=allocator.peak_allocated,
        reserved=allocator.peak_allocated if runtime.host else allocator.peak_reserved,
        activations=run.tape.peak_kept,
    )


@dataclass
class _Forward:
    """What a forward of one chunk on one sub-sequence has left behind."""

    inputs: list[tuple[float, Block]]
    layers: list[Saved]
    head: Saved | None = None
    ahead: list[Saved] = field(default_factory=list)
    deferred: Block | None = None


class _StageTrace:
    """The tensors of one stage."""

    def __init__(
        self, setting: Setting, runtime: Runtime, stage: int, static: Sequence[float]
    ) -> None:
        self.setting, self.chunks = setting, setting.chunks[stage]
        self.tape = Tape(runtime)
        self.layer = Layer(setting, self.tape)
        self.parts = [Sizes(setting, setting.tokens(part)) for part in range(setting.num_splits)]
        self.static = sum(static)
        for size in static:
            if size:
                self.tape.new(size)
        self.live: dict[tuple[int, int, int], _Forward] = {}
        self.carries: dict[tuple[int, int, int], Carry] = {}

    def run(self, action: Action) -> None:
        """Run one action; sends and receives hold what their computations count."""
        place = action[1:]
        self.tape.is_forward = action.kind is Kind.F
        if action.kind is Kind.F:
            self.live[place] = self._forward(*place)
        elif action.kind is Kind.B:
            self._backward(self.live.pop(place), *place)
        elif action.kind is Kind.I:
            forward = self.live[place]
            self._backward(forward, *place)
            size = self._deferred(*place)
            forward.deferred = self.tape.new(size)
            self.tape.keep(size)
        elif action.kind is Kind.W:
            forward = self.live.pop(place)
            if forward.deferred is not None:
                self.tape.free(forward.deferred)
                self.tape.keep(-self._deferred(*place))
        else:
            return
        self.tape.end_action()

    def _carry(self, chunk: int, micro_batch: int, layer: int) -> Carry:
        return self.carries.setdefault((chunk, micro_batch, layer), Carry())

    def _group(self, layer: int) -> int:
        """Return the first layer of the group that is computed anew together with ``layer``."""
        recompute = self.setting.recompute
        size = recompute.num_layers if recompute.method == "uniform" else 1
        return layer // size * size

    def _forward(self, number: int, micro_batch: int, part: int) -> _Forward:
        tape, sizes, chunk = self.tape, self.parts[part], self.chunks[number]
        is_first_input = True
        x = self._input(sizes, chunk)
        forward = _Forward([], [])
        for index, experts in enumerate(chunk.layers):
            recomputed = self.setting.recompute.is_full(index)
            keeps = not recomputed or self._group(index) == index
            if keeps or is_first_input:
                forward.inputs.append(self._kept(sizes.residual, x))
            saved = Saved(tape)
            y = self.layer.forward(
                saved, sizes, self._carry(number, micro_batch, index), part, experts=experts
            )
            if not (keeps or is_first_input):
                tape.free(x)
            if recomputed:
                saved.drop_all()
            forward.layers.append(saved)
            is_first_input = False
            x = y
        if chunk.mtp or chunk.head:
            forward.ahead = self._predict_ahead(sizes, number, micro_batch, part)
        if chunk.head:
            forward.head = self._head(sizes, x)
        elif chunk.layers:
            tape.free(x)
        else:
            forward.inputs.append(self._kept(sizes.residual, x))
        return forward

    def _kept(self, size: float, block: Block) -> tuple[float, Block]:
        self.tape.keep(size)
        return size, block

    def _input(self, sizes: Sizes, chunk: ChunkLayers) -> Block:
        """Embed tokens, or receive what the stage before sends."""
        if not chunk.embedding or sizes.shards == 1:
            return self.tape.new(sizes.residual)
        whole = self.tape.new(sizes.full)
        x = self.tape.new(sizes.residual)
        self.tape.free_communicated(whole)
        return x

    def _head(self, sizes: Sizes, x: Block) -> Saved:
        """Norm, output layer and loss; ``x`` is the last layer's output."""
        saved = Saved(self.tape)
        saved.adopt("output", sizes.residual, x)
        if self.layer.normed_too:
            saved.new("normed", sizes.residual)
        saved.new("head input", sizes.residual)
        self._loss(saved, sizes)
        return saved

    def _loss(self, saved: Saved, sizes: Sizes) -> None:
        """Output layer and loss of a forward."""
        self._softmax(saved, sizes)
        if self.setting.recompute.loss:
            saved.drop("softmax")

    def _softmax(self, saved: Saved, sizes: Sizes) -> None:
        if sizes.shards > 1:
            self.tape.gather(sizes.full)
        logits = self.tape.new(sizes.logits)
        if sizes.element == 4:
            saved.adopt("softmax", sizes.loss_logits, logits)
            return
        saved.new("softmax", sizes.loss_logits)
        self.tape.free(logits)

    def _predict_ahead(self, sizes: Sizes, number: int, micro_batch: int, part: int) -> list[Saved]:
        """Layers of multi-token prediction: two norms and a projection, a layer, and a loss."""
        chunk, ahead = self.chunks[number], []
        experts = self.setting.model.expert_layers[-1] if chunk.mtp else False
        for index in range(chunk.mtp):
            saved = Saved(self.tape)
            saved.new("embedded", sizes.residual)
            saved.new("normed embedding", sizes.residual)
            saved.new("normed hidden states", sizes.residual)
            saved.new("both", 2 * sizes.residual)
            saved.new("mtp layer input", sizes.residual)
            carry = self._carry(number, micro_batch, len(chunk.layers) + index)
            output = self.layer.forward(saved, sizes, carry, part, experts=experts)
            saved.adopt("mtp output", sizes.residual, output)
            saved.new("mtp head input", sizes.residual)
            self._loss(saved, sizes)
            ahead.append(saved)
        return ahead

    def _backward(self, forward: _Forward, number: int, micro_batch: int, part: int) -> None:
        tape, sizes, chunk = self.tape, self.parts[part], self.chunks[number]
        if forward.head is not None:
            gradient = self._head_backward(forward.head, sizes)
        else:
            gradient = tape.new(sizes.residual)
        for index, saved in reversed(list(enumerate(forward.ahead))):
            carry = self._carry(number, micro_batch, len(chunk.layers) + index)
            gradient = self._ahead_backward(saved, sizes, carry, part, gradient)
        if not chunk.layers and forward.head is None:
            self._free_input(forward)
        for index in reversed(range(len(chunk.layers))):
            carry = self._carry(number, micro_batch, index)
            self._recompute(forward, number, micro_batch, part, index)
            gradient = self.layer.backward(
                forward.layers[index], sizes, carry, part, gradient, experts=chunk.layers[index]
            )
            if not self.setting.recompute.is_full(index) or self._group(index) == index:
                self._free_input(forward)
            forward.layers[index].drop_all()
            if part == 0:
                del self.carries[number, micro_batch, index]
        if chunk.embedding and sizes.shards > 1:
            tape.free_communicated(tape.new(sizes.full))
        tape.free(gradient)

    def _free_input(self, forward: _Forward) -> None:
        size, block = forward.inputs.pop()
        self.tape.free(block)
        self.tape.keep(-size)

    def _recompute(
        self, forward: _Forward, number: int, micro_batch: int, part: int, layer: int
    ) -> None:
        """Compute a group of layers anew when its last one is to go back."""
        recompute, layers = self.setting.recompute, self.chunks[number].layers
        if not recompute.is_full(layer):
            return
        first = self._group(layer)
        following = layer + 1
        if following < len(layers) and self._group(following) == first:
            return
        tape, sizes = self.tape, self.parts[part]
        for index in range(first, layer + 1):
            carry = self._carry(number, micro_batch, index)
            output = self.layer.forward(
                forward.layers[index], sizes, carry, part, experts=layers[index]
            )
            if index < layer:
                forward.layers[index + 1].adopt("input", sizes.residual, output)
            else:
                tape.free(output)

    def _head_backward(self, saved: Saved, sizes: Sizes) -> Block:
        tape = self.tape
        inner = self._loss_backward(saved, sizes)
        if sizes.shards > 1:
            tape.gather(sizes.full)
            scattered = tape.new(sizes.residual)
            tape.free_communicated(inner)
            inner = scattered
        saved.drop("head input")
        gradient = tape.new(sizes.residual)
        tape.free(inner)
        saved.drop_all()
        return gradient

    def _loss_backward(self, saved: Saved, sizes: Sizes) -> Block:
        """From the softmax to the gathered gradient of the output layer's input."""
        tape = self.tape
        if self.setting.recompute.loss:
            self._softmax(saved, sizes)
        logits = tape.new(sizes.logits)
        saved.drop("softmax")
        inner = tape.new(sizes.full)
        tape.free(logits)
        return inner

    def _ahead_backward(
        self, saved: Saved, sizes: Sizes, carry: Carry, part: int, gradient: Block
    ) -> Block:
        tape = self.tape
        tape.free(self._loss_backward(saved, sizes))
        experts = self.setting.model.expert_layers[-1]
        inner = tape.new(sizes.residual)
        inner = self.layer.backward(saved, sizes, carry, part, inner, experts=experts)
        tape.passing(2 * sizes.residual)
        saved.drop_all()
        total = tape.new(sizes.residual)
        tape.free(inner, gradient)
        return total

    def _deferred(self, number: int, micro_batch: int, part: int) -> float:
        """Return what a W waits for: inputs and output gradients of every linear layer."""
        sizes, chunk = self.parts[part], self.chunks[number]
        total = 0.0
        for experts in chunk.layers:
            total += 2 * sizes.full + sizes.query + sizes.key + sizes.value + sizes.attended
            if experts:
                total += 2 * sizes.dispatched + 3 * sizes.expert_activated
            else:
                total += 2 * sizes.full + sizes.projected + sizes.activated
        return total + (sizes.logits + sizes.full if chunk.head else 0.0)
