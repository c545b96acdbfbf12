"""One forward pass of a dispatched model: what its layers must know of the whole group's rows."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seq1f1b.ulysses.errors import UnsupportedModelError
from seq1f1b.ulysses.exchange import Exchange
from seq1f1b.ulysses.memory.carry import Carry
from seq1f1b.ulysses.mesh import SequenceParallel
from seq1f1b.ulysses.rows import Pattern, Rows
from seq1f1b.ulysses.units import WorkPlan, plan_work


@dataclass(frozen=True)
class Choices:
    """What the user has chosen for attention: a core by its name, and one unit at a time."""

    core: str | None = None
    unit_at_a_time: bool = False


class Run:
    """Rows of the group, this rank's shard of them, and the work plans of the layers.

    Layers that mix tokens count in ``num_mixed``, calls of the loss function in ``num_losses``;
    ``num_items`` divides the summed loss, unless it is None and the shard's targets do.

    part: the rows' tokens that this pass computes, shared out over the ranks. carry: where keys and
    values of the parts before are; None if there is but one part. is_closed: a probe is running,
    in which every mixing layer looks at each token alone. door: makes a context that is entered
    with the pass, where calls of torch's own attention must be caught.
    """

    def __init__(
        self,
        parallel: SequenceParallel,
        rows: Rows,
        *,
        part: slice | None = None,
        carry: Carry | None = None,
        choices: Choices | None = None,
        is_closed: bool = False,
        door: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.parallel, self.rows, self.carry = parallel, rows, carry
        self.part = slice(0, rows.length) if part is None else part
        self.shard = (self.part.stop - self.part.start) // parallel.size
        self.choices = Choices() if choices is None else choices
        self.is_closed = is_closed
        self._door = door
        self.exchange = Exchange(parallel, self.shard, self.part.start)
        self.num_mixed = 0
        self.num_losses = 0
        self.num_items: Tensor | int | None = None
        self.targets: Tensor | None = None
        self._plans: dict[tuple[int, int, Pattern], WorkPlan] = {}
        self._moved: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def own(self) -> slice:
        """The shard's place in the rows."""
        first = self.part.start + self.parallel.rank * self.shard
        return slice(first, first + self.shard)

    def plan(self, num_heads: int, num_kv_heads: int, pattern: Pattern) -> WorkPlan:
        """Return who computes what in a layer; layers of one shape share it."""
        key = num_heads, num_kv_heads, pattern
        if key not in self._plans:
            size = self.parallel.size
            self._plans[key] = plan_work(*key[:2], size, self.rows, pattern, self.part)
        return self._plans[key]

    def on(self, device: torch.device, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make`` returns, on ``device``, made once."""
        key = name, device
        if key not in self._moved:
            self._moved[key] = make().to(device)
        return self._moved[key]

    def refuse_parts(self, what: str) -> None:
        """Raise UnsupportedModelError if the rows are computed in sub-sequences."""
        if self.carry is not None:
            raise UnsupportedModelError(
                f"subsequences: {what} runs through the whole sequence, and only keys and values "
                f"are carried from one sub-sequence to the next; set subsequences to 1"
            )

    def check_length(self, length: int, what: str) -> None:
        """Raise RuntimeError when a layer has another number of tokens than the shard."""
        if length != self.shard:
            raise RuntimeError(
                f"{what} got {length} tokens where each rank holds {self.shard}: sequence "
                f"parallelism takes no cache, no prefix and no second sequence"
            )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let ``current_run`` return this inside."""
        token = _CURRENT.set(self)
        try:
            with self._door():
                yield
        finally:
            _CURRENT.reset(token)

    def bind(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` as it runs within this forward pass, whenever it is called.

        Activation recomputation calls it again in the backward pass, when other forward passes may
        have come between.
        """

        def bound(*args: Any, **kwargs: Any) -> Any:
            with self.active():
                return function(*args, **kwargs)

        return bound


def each_alone(value: Tensor, *others: Tensor) -> Tensor:
    """Return what a closed door lets through: of each token, something of all its tensors.

    value ``[b, heads, n, dim]`` is scaled by a number drawn from each other tensor of the token, so
    that a fault in any of them shows behind the door.
    """
    factor = torch.ones_like(value[..., :1])
    for x in others:
        ramp = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype, device=x.device)
        size = x.square().mean(dim=-1, keepdim=True).sqrt() + 1e-12
        share = ((x * ramp).mean(dim=-1, keepdim=True) / size).to(value.dtype)
        factor = factor + share.repeat_interleave(value.shape[1] // share.shape[1], dim=1)
    return value * factor


_CURRENT: ContextVar[Run | None] = ContextVar("run", default=None)


def current_run() -> Run | None:
    """Return the forward pass that runs in this thread, if it is one of a dispatched model."""
    return _CURRENT.get()


def require_run(what: str) -> Run:
    """Return the running forward pass for ``what``.

    Raises RuntimeError outside of one: the layer was called alone, or is recomputed by something
    that does not know which pass it recomputes.
    """
    run = _CURRENT.get()
    if run is None:
        raise RuntimeError(
            f"{what} runs outside a forward pass of its dispatched model. Call the model that was "
            f"given to dispatch_modules; for activation recomputation use the model's own "
            f"activation_checkpointing_enable()"
        )
    return run
