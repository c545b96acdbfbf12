"""The one object that knows which action is running, for the layers that have to know."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from seq1f1b.attention import (
    CarryPool,
    Kernel,
    LayerCarry,
    causal_attention,
    choose_kernel,
    packed_attention,
)
from seq1f1b.runtime.weight_gradients import Accumulate, WeightGradients
from seq1f1b.schedule import Action, Kind
from seq1f1b.sequence import Documents, SubSequence


class ExecutionContext:
    """Holds one rank's running step and action, its KV carries and its deferred weight gradients.

    documents: of the running step if its sequences are packed: for each micro-batch the documents
    of every row; None if each row is one document. lengths_vary: whether the next micro-batch is
    probably not as long as this one, so that its buffers are not worth keeping. Both belong to
    ``step``. kernel_taken: the name of the attention kernel that ran last.
    """

    def __init__(self, kernel: str | None = None) -> None:
        self.carries = CarryPool()
        self.weight_gradients = WeightGradients()
        self.action: Action | None = None
        self.part: SubSequence | None = None
        self.documents: Sequence[Sequence[Documents]] | None = None
        self.lengths_vary = False
        self.use_kernel(kernel)

    def use_kernel(self, name: str | None) -> None:
        """Use the attention kernel called ``name``; None uses the best that is available."""
        self._kernel = name
        self._chosen: dict[Hashable, Kernel] = {}
        self.kernel_taken: str | None = None

    @contextmanager
    def step(
        self,
        *,
        documents: Sequence[Sequence[Documents]] | None = None,
        lengths_vary: bool = False,
    ) -> Iterator[None]:
        """Own one step: set what it knows of its sequences, and drop what it leaves if it fails.

        A failed step leaves neither KV carry nor deferred weight gradients behind, which the next
        one would add to.
        """
        self.documents, self.lengths_vary = documents, lengths_vary
        try:
            yield
            self.carries.trim()
        except BaseException:
            self.carries.drop()
            self.weight_gradients.drop()
            raise
        finally:
            self.documents, self.lengths_vary = None, False

    @contextmanager
    def running(self, action: Action, part: SubSequence) -> Iterator[None]:
        """Mark ``action`` as running on ``part``; a backward may recompute the forward in it."""
        self.action, self.part = action, part
        try:
            yield
        finally:
            self.action = self.part = None

    @contextmanager
    def uncut(self) -> Iterator[None]:
        """Treat the running action's micro-batch as a whole: nothing is cut while this is open."""
        part, self.part = self.part, None
        try:
            yield
        finally:
            self.part = part

    @property
    def running_documents(self) -> Sequence[Documents] | None:
        """The documents of the running micro-batch's rows; None if they are not packed."""
        if self.documents is None or self.action is None:
            return None
        return self.documents[self.action.micro_batch]

    @property
    def cut_part(self) -> SubSequence | None:
        """The running sub-sequence if it is less than its whole micro-batch."""
        return None if self.part is None or self.part.is_whole else self.part

    @property
    def offset(self) -> int:
        """Position of the running sub-sequence's first token; 0 when nothing runs."""
        return self.part.start if self.part else 0

    def attend(
        self, layer: object, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Causal attention of ``layer`` over the running sub-sequence and those before it.

        Shapes are those of ``causal_attention``. When no sub-sequence runs, or it is the whole
        micro-batch, the tensors are the whole sequence and nothing is carried.
        """
        kernel = self._kernel_for(query, key, value)
        self.kernel_taken = kernel.name
        documents = self.running_documents
        if self.action is not None and self.part is not None and documents is not None:
            return packed_attention(
                query,
                key,
                value,
                kernel=kernel,
                scale=scale,
                part=self.part,
                documents=documents,
                carry_of=partial(self._document_carry, self.action, layer),
            )
        part = self.cut_part
        if self.action is None or part is None:
            return causal_attention(query, key, value, kernel=kernel, scale=scale)
        owner = self.action.chunk, self.action.micro_batch
        carry = self.carries.carry(
            owner, layer, part.total, key, value, reuse=not self.lengths_vary
        )
        return causal_attention(
            query, key, value, kernel=kernel, scale=scale, carry=carry, part=part
        )

    def _kernel_for(self, query: Tensor, key: Tensor, value: Tensor) -> Kernel:
        """Return the kernel for tensors like these, chosen once."""
        like = (query.device, query.dtype, *(x.shape[2:] for x in (query, key, value)))
        if like not in self._chosen:
            self._chosen[like] = choose_kernel(query, key, value, self._kernel)
        return self._chosen[like]

    def _document_carry(
        self,
        action: Action,
        layer: object,
        row: int,
        document: int,
        total: int,
        keys: Tensor,
        values: Tensor,
    ) -> LayerCarry:
        owner = action.chunk, action.micro_batch
        place = layer, row, document
        return self.carries.carry(owner, place, total, keys, values, reuse=False)

    @property
    def defers_weight_gradients(self) -> bool:
        """Whether the running action is the input-gradient half of a backward."""
        return self.action is not None and self.action.kind is Kind.I

    def weight_gradient(self, accumulate: Accumulate, inputs: Tensor, gradient: Tensor) -> None:
        """Call ``accumulate(inputs, gradient)`` now, or in its W while an I runs."""
        self.weight_gradients.add(self.action, accumulate, inputs, gradient)

    def release_carry(self, action: Action) -> None:
        """Give back what was carried through the micro-batch of ``action``."""
        self.carries.release((action.chunk, action.micro_batch))
