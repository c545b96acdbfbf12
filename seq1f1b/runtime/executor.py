"""Runs a rank's actions one after the other; it knows no schedule."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.profiler import record_function

from seq1f1b.errors import Seq1F1BError
from seq1f1b.runtime.clock import ActionClock
from seq1f1b.runtime.context import ExecutionContext
from seq1f1b.runtime.transport import Pending, Transport
from seq1f1b.schedule import Action, Kind
from seq1f1b.sequence import Documents, SubSequence


class ActionError(Seq1F1BError, RuntimeError):
    """An action failed; the message names stage, step and action, the cause is chained."""


class Computation(Protocol):
    """What a stage computes in one action."""

    def forward(self, action: Action, received: Tensor | None) -> Tensor:
        """Return the stage's output, or on the last model part the loss.

        ``received`` is the output of the model part before, None on the first.
        """
        ...

    def backward(
        self, action: Action, received: Tensor | None, output: Tensor, gradient: Tensor | None
    ) -> Tensor | None:
        """Add to the parameters' gradients and return the gradient of ``received``.

        ``gradient`` is that of ``output``, None on the last model part. When ``action`` is an I,
        what went through ``ExecutionContext.weight_gradient`` is left for ``weight_gradients``.
        """
        ...

    def weight_gradients(self, action: Action) -> None:
        """Add the weight gradients that the I of ``action`` left."""
        ...

    def output_sent(self, output: Tensor) -> None:
        """The output has been handed to the next stage; only its graph is needed now."""
        ...


class Visits(Protocol):
    """Model chunks that come to the device and leave it."""

    def load(self, action: Action) -> None:
        """Begin to bring the model chunk of ``action`` to the device."""
        ...

    def wait(self, action: Action) -> None:
        """Return when the model chunk of a computation is on the device."""
        ...

    def free(self, action: Action) -> None:
        """Give its place up, after a FREE_B when its gradients have left it."""
        ...


def execute(
    actions: Sequence[Action],
    computation: Computation,
    transport: Transport,
    context: ExecutionContext,
    parts: Sequence[Sequence[SubSequence]],
    clock: ActionClock,
    *,
    stage: int,
    documents: Sequence[Sequence[Documents]] | None = None,
    lengths_vary: bool = False,
    visits: Visits | None = None,
) -> None:
    """Run ``actions`` (lowered, of one stage) to the end.

    parts: for each micro-batch its sub-sequences. documents, lengths_vary: see ExecutionContext.
    visits: what loads and frees model chunks, for actions that do.
    Profiles show each action by its name. Raises ActionError from whatever an action raised; the
    context is then as if the step had not begun, and the transport cannot be used again. After a
    step every tensor is consumed and the KV carry is whole, which is asserted.
    """
    with context.step(documents=documents, lengths_vary=lengths_vary):
        run = _Run(computation, transport, context, parts, clock, actions, visits)
        for step, action in enumerate(actions):
            try:
                with record_function(str(action)):
                    run.handlers[action.kind](action)
            except Exception as error:
                message = f"stage {stage}, step {step} of {len(actions)}, action {action}: {error}"
                raise ActionError(message) from error
        transport.finish()
        run.check_empty()


class _Run:
    """The tensors of one step that are alive between actions."""

    def __init__(
        self,
        computation: Computation,
        transport: Transport,
        context: ExecutionContext,
        parts: Sequence[Sequence[SubSequence]],
        clock: ActionClock,
        actions: Sequence[Action],
        visits: Visits | None,
    ) -> None:
        self.computation = computation
        self.transport = transport
        self.context = context
        self.parts = parts
        self.clock = clock
        self.trains = any(action.kind in (Kind.B, Kind.I) for action in actions)
        self.visits = visits
        self.sends = {action for action in actions if action.kind.is_send}
        self.arriving: dict[Action, Pending] = {}
        self.alive: dict[Action, tuple[Tensor | None, Tensor]] = {}
        self.gradients: dict[Action, Tensor] = {}
        self.handlers = {
            Kind.F: self.forward,
            Kind.B: self.backward,
            Kind.I: self.backward,
            Kind.W: self.weight_gradients,
            Kind.SEND_F: self.send_forward,
            Kind.SEND_B: self.send_backward,
            Kind.RECV_F: self.receive,
            Kind.RECV_B: self.receive,
        }
        if visits is not None:
            self.handlers |= dict.fromkeys((Kind.LOAD_F, Kind.LOAD_B), visits.load)
            self.handlers |= dict.fromkeys((Kind.FREE_F, Kind.FREE_B), visits.free)

    def forward(self, action: Action) -> None:
        received = self.take(action.of_kind(Kind.RECV_F))
        if received is not None and self.trains:
            received.requires_grad_()
        part = self.part(action)
        self.wait_for_chunk(action)
        self.clock.begin()
        with self.context.running(action, part):
            output = self.computation.forward(action, received)
        self.clock.end(action)
        if self.trains or action.of_kind(Kind.SEND_F) in self.sends:
            self.alive[action] = (received, output)
        if part.is_last and not self.trains:
            self.context.release_carry(action)

    def backward(self, action: Action) -> None:
        gradient = self.take(action.of_kind(Kind.RECV_B))
        received, output = self.alive.pop(action.of_kind(Kind.F))
        self.wait_for_chunk(action)
        self.clock.begin()
        with self.context.running(action, self.part(action)):
            input_gradient = self.computation.backward(action, received, output, gradient)
        self.clock.end(action)
        send = action.of_kind(Kind.SEND_B)
        if send in self.sends:
            assert input_gradient is not None, f"{action} made no gradient to send"
            self.gradients[send] = input_gradient
        if action.sub_sequence == 0:
            self.context.release_carry(action)

    def wait_for_chunk(self, action: Action) -> None:
        if self.visits is not None:
            self.visits.wait(action)

    def weight_gradients(self, action: Action) -> None:
        self.wait_for_chunk(action)
        self.clock.begin()
        self.computation.weight_gradients(action)
        self.clock.end(action)

    def receive(self, action: Action) -> None:
        self.arriving[action] = self.transport.receive(action)

    def send_forward(self, action: Action) -> None:
        forward = action.of_kind(Kind.F)
        _, output = self.alive[forward] if self.trains else self.alive.pop(forward)
        self.transport.send(action, output)
        self.computation.output_sent(output)

    def send_backward(self, action: Action) -> None:
        self.transport.send(action, self.gradients.pop(action))

    def take(self, action: Action) -> Tensor | None:
        pending = self.arriving.pop(action, None)
        return pending.wait() if pending else None

    def part(self, action: Action) -> SubSequence:
        return self.parts[action.micro_batch][action.sub_sequence]

    def check_empty(self) -> None:
        for name in ("arriving", "alive", "gradients"):
            left = getattr(self, name)
            assert not left, f"{name} after the step: {', '.join(map(str, left))}"
        self.context.carries.check_whole()
        self.context.weight_gradients.check_empty()
