"""What an attention kernel offers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Inputs(NamedTuple):
    """What attention is computed of.

    query ``[n, b, heads, k dim]``, key ``[c + n, b, kv heads, k dim]`` and value
    ``[c + n, b, kv heads, v dim]``, where heads is a multiple of kv heads. ``scale`` multiplies the
    products of queries and keys before the softmax.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return them with ``change`` made to each tensor."""
        return Inputs(change(self.query), change(self.key), change(self.value), self.scale)


class Attended(NamedTuple):
    """What a kernel's forward returns and its backward takes.

    output ``[n, b, heads, v dim]``; the log-sum-exp is of the kernel's own kind.
    """

    output: Tensor
    log_sum_exp: Tensor


@dataclass(frozen=True)
class Gradients:
    """Of the query, of the last n keys and values, and of the first c keys and values if any.

    Those of the first c may have any type: they are added up in at least float32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    before: tuple[Tensor, Tensor] | None

    @classmethod
    def of_all(cls, query: Tensor, key: Tensor, value: Tensor) -> "Gradients":
        """Take those of n queries and of all c + n keys and values, of one type."""
        prefix = key.shape[0] - query.shape[0]
        before = (key[:prefix], value[:prefix]) if prefix else None
        return cls(query, key[prefix:], value[prefix:], before)


class Kernel(Protocol):
    """Causal attention of the last n of c + n tokens over all of them.

    Query i may look at keys 0 to c + i.
    """

    name: str

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the kernel can compute on tensors of this device, type and head size."""
        ...

    def forward(self, inputs: Inputs) -> Attended:
        """Return the output, and what the backward needs besides."""
        ...

    def backward(self, grad_output: Tensor, inputs: Inputs, attended: Attended) -> Gradients:
        """Return the gradients."""
        ...


@runtime_checkable
class PackedKernel(Kernel, Protocol):
    """A kernel that computes documents of different lengths in one call.

    Shapes are those of ``Inputs`` with no prefix and a batch of 1: documents of ``lengths`` tokens
    lie one behind the other, and each one's tokens attend causally within it.
    """

    def forward_packed(self, inputs: Inputs, lengths: tuple[int, ...]) -> Attended:
        """See Kernel.forward."""
        ...

    def backward_packed(
        self, grad_output: Tensor, inputs: Inputs, attended: Attended, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value."""
        ...
