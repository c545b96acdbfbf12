"""Weight gradients deferred to an action of their own, where they fill gaps in the pipeline."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seq1f1b.schedule import Action, Kind

Accumulate = Callable[[Tensor, Tensor], None]
_Task = tuple[Accumulate, Tensor, Tensor]


class WeightGradients:
    """The weight gradients of one rank: computed at once, or deferred from an I to its W.

    bytes_in_use: inputs and output gradients that are deferred. on_defer: called, if set, whenever
    ``bytes_in_use`` has grown.
    """

    def __init__(self) -> None:
        self._deferred: defaultdict[Action, list[_Task]] = defaultdict(list)
        self.bytes_in_use = 0
        self.on_defer: Callable[[], None] | None = None

    def add(
        self, running: Action | None, accumulate: Accumulate, inputs: Tensor, gradient: Tensor
    ) -> None:
        """Call ``accumulate(inputs, gradient)`` now, or if an I is running, in its W.

        inputs: what the layer multiplied its weight with, ``[tokens, in features]``.
        gradient: of the layer's output, ``[tokens, out features]``.
        """
        if running is None or running.kind is not Kind.I:
            accumulate(inputs, gradient)
            return
        self._deferred[running.of_kind(Kind.W)].append((accumulate, inputs, gradient))
        self.bytes_in_use += inputs.nbytes + gradient.nbytes
        if self.on_defer is not None:
            self.on_defer()

    @torch.no_grad()
    def compute(self, action: Action) -> None:
        """Compute what was deferred to ``action``, a W, layer by layer, and free its tensors."""
        tasks = self._deferred.pop(action, [])
        tasks.reverse()
        while tasks:
            accumulate, inputs, gradient = tasks.pop()
            accumulate(inputs, gradient)
            self.bytes_in_use -= inputs.nbytes + gradient.nbytes

    def drop(self) -> None:
        """Forget everything deferred, of a step that failed."""
        self._deferred.clear()
        self.bytes_in_use = 0

    def check_empty(self) -> None:
        """Assert that nothing is deferred any more, as it must be at the end of every step."""
        left = ", ".join(map(str, self._deferred))
        assert not self._deferred, f"weight gradients never computed: {left}"


class DeferrableLinear(nn.Linear):
    """``nn.Linear`` whose weight gradient a W action can compute.

    defer: takes what WeightGradients.add takes after the action, usually
    ``ExecutionContext.weight_gradient``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        defer: Callable[[Accumulate, Tensor, Tensor], None],
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.defer = defer

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``, ``[..., out features]``."""
        output = _Linear.apply(input, self.weight, self)
        bias: Tensor | None = self.bias
        return output if bias is None else output + bias

    def accumulate(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add the weight's gradient to ``weight.grad``."""
        if self.weight.grad is None:
            self.weight.grad = gradient.t() @ inputs
        else:
            self.weight.grad.addmm_(gradient.t(), inputs)


class _Linear(torch.autograd.Function):
    """The product with the weight; the weight's gradient goes to the layer, not to autograd."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, layer: DeferrableLinear) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.layer = layer
        return input @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        layer: DeferrableLinear = ctx.layer
        layer.defer(layer.accumulate, input.flatten(0, -2), grad_output.flatten(0, -2))
        return grad_output @ weight, None, None
