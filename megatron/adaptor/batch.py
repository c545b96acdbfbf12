"""Hand one micro-batch out once per sub-sequence, and cut it where Megatron cuts for its ranks.

Training scripts fetch a whole micro-batch in every forward step and pass it through
``get_batch_on_this_cp_rank``. Fetching the same one again for each sub-sequence and cutting there
lets scripts work that know nothing of sub-sequences.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from seq1f1b.runtime import ExecutionContext

_UNCUT = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


class Replay:
    """The data iterator of one model chunk, which repeats a micro-batch until told to go on.

    ``hidden`` names entries that are handed out as None.
    """

    def __init__(self, source: Iterator[Any], hidden: Sequence[str] = ()) -> None:
        self._source = source
        self._hidden = hidden
        self._ahead: deque[Any] = deque()
        self._current: Any = None
        self._wants_next = True

    def __iter__(self) -> "Replay":
        return self

    def __next__(self) -> Any:
        if self._wants_next:
            self._current = self._ahead.popleft() if self._ahead else next(self._source)
            self._wants_next = False
        if not isinstance(self._current, dict):
            return self._current
        # A copy, because scripts take entries out of the dict that they get.
        hidden = {key: None for key in self._hidden if key in self._current}
        return {**self._current, **hidden}

    def read_ahead(self, number: int) -> list[Any]:
        """Return the next ``number`` micro-batches, nothing hidden; they are handed out as ever."""
        self._ahead.extend(next(self._source) for _ in range(number))
        return list(self._ahead)

    def go_on(self) -> None:
        """The next fetch is for a new micro-batch."""
        self._wants_next = True


class BatchCutter:
    """Cuts batches to the running sub-sequence and remembers how many of its tokens count."""

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        self._masks: tuple[Tensor, Tensor] | None = None
        self._wholes: list[tuple[Tensor, Tensor]] = []

    def replacement(self, original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Return ``get_batch_on_this_cp_rank`` with the cut added."""

        def get_batch_on_this_cp_rank(batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return original(self._cut(batch), *args, **kwargs)

        return get_batch_on_this_cp_rank

    def forget(self) -> None:
        """A new action begins; nothing is known of its tokens yet."""
        self._masks = None
        self._wholes = []

    def remember(self, cut: Tensor, whole: Tensor) -> None:
        """Let ``whole_of(cut)`` be ``whole`` until the next action."""
        self._wholes.append((cut, whole))

    def whole_of(self, tensor: Tensor) -> Tensor | None:
        """Return what ``tensor`` was cut from, ``[b, total]``; None if it was not cut here."""
        return next((whole for cut, whole in self._wholes if cut is tensor), None)

    def weight(self) -> Tensor | float:
        """Return the running sub-sequence's share of the micro-batch's tokens that count."""
        part = self._context.part
        assert part is not None, "weight asked for outside of a sub-sequence"
        if self._masks is None:
            return part.length / part.total
        own, whole = self._masks
        return own.sum() / whole.sum().clamp(min=1)

    def num_tokens(self) -> Tensor | None:
        """Return how many tokens of the whole micro-batch count; None if no mask says so."""
        return None if self._masks is None else self._masks[1].sum()

    def _cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        part = self._context.cut_part
        if part is None:
            return batch
        cut = {
            key: value[:, part.start : part.stop]
            if key not in _UNCUT
            and isinstance(value, Tensor)
            and value.dim() >= 2
            and value.shape[1] == part.total
            else value
            for key, value in batch.items()
        }
        for key, value in cut.items():
            if value is not batch[key]:
                self.remember(value, batch[key])
        # Sub-sequences attend causally to their prefix; a mask over the whole sequence is no use.
        cut["attention_mask"] = None
        mask = batch.get("loss_mask")
        if mask is not None:
            self._masks = cut["loss_mask"], mask
        return cut
