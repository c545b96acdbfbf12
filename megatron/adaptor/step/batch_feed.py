"""Repeat a micro-batch once per sub-sequence, and cut it where Megatron cuts for its ranks.

Training scripts fetch a whole micro-batch in every forward step and pass it through
``get_batch_on_this_cp_rank``. Fetching the same one again for each sub-sequence and cutting there
lets scripts work that know nothing of sub-sequences.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from megatron.adaptor.step.masks import check_mask
from seq1f1b.errors import Seq1F1BError
from seq1f1b.runtime import ExecutionContext
from seq1f1b.sequence import SubSequence

_UNCUT = frozenset(
    {"cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group"}
)
_MASK = "attention_mask"


class DataError(Seq1F1BError, RuntimeError):
    """The data iterator does not deliver what a step of sub-sequences needs."""


class BatchFeed:
    """The data iterator of one model chunk, which repeats the items of the selected micro-batch.

    hidden: names of entries that are handed out as None. repeats: whether a micro-batch is fetched
    more than once, so that it must be protected from changes in place. cut: what is done to an item
    before it is handed out.
    """

    def __init__(
        self, source: Iterator[Any], hidden: Sequence[str] = (), *, repeats: bool = True
    ) -> None:
        self.cut: Callable[[Any], Any] = lambda item: item
        self._source = source
        self._hidden = hidden
        self._repeats = repeats
        self._ahead: deque[Any] = deque()
        self._was_read_ahead = False
        self._items: dict[int, list[BatchItem]] = {}
        self._complete: set[int] = set()
        self._num_begun = 0
        self._selected = 0
        self._position = 0

    def __iter__(self) -> "BatchFeed":
        return self

    def __next__(self) -> Any:
        items = self._items.setdefault(self._selected, [])
        if self._position == len(items):
            self._check_may_grow(len(items))
            items.append(BatchItem(self._fetch(), protect=self._repeats))
        item = items[self._position].handed_out()
        self._position += 1
        if isinstance(item, dict):
            item = {**item, **{key: None for key in self._hidden if key in item}}
        return self.cut(item)

    @property
    def was_read(self) -> bool:
        """Whether anything was fetched since a micro-batch was selected."""
        return self._position > 0

    def select(self, micro_batch: int) -> None:
        """Let the next fetches deliver ``micro_batch`` from its first item on.

        Micro-batches before it that were not selected yet are assumed to be one item each.
        """
        if micro_batch in self._items:
            self._complete.add(micro_batch)
        for skipped in range(self._num_begun, micro_batch):
            self._items[skipped] = [BatchItem(self._fetch(), protect=self._repeats)]
        self._num_begun = max(self._num_begun, micro_batch + 1)
        self._selected, self._position = micro_batch, 0

    def release(self, micro_batch: int) -> None:
        """Drop a micro-batch whose last fetch is done."""
        self._items.pop(micro_batch, None)

    def read_ahead(self, number: int) -> list[Any]:
        """Return the next ``number`` micro-batches, nothing hidden; they are still handed out."""
        self._was_read_ahead = True
        while len(self._ahead) < number:
            self._ahead.append(self._next_of_source())
        return list(self._ahead)

    def _fetch(self) -> Any:
        return self._ahead.popleft() if self._ahead else self._next_of_source()

    def _next_of_source(self) -> Any:
        try:
            return next(self._source)
        except StopIteration:
            raise DataError(
                f"the data iterator ended before micro-batch {self._num_begun + len(self._ahead)} "
                "of this step: it must deliver as many micro-batches as a step has"
            ) from None

    def _check_may_grow(self, num_items: int) -> None:
        if self._selected in self._complete:
            raise DataError(
                f"the forward step fetched {num_items} item(s) for the first sub-sequence of "
                f"micro-batch {self._selected} and more for a later one: it must fetch the same "
                "for each, or use --seq1f1b-splits 1"
            )
        if num_items and self._was_read_ahead:
            raise DataError(
                "the forward step fetches several items per micro-batch, which cannot go with "
                "packed documents or lengths that vary: use --seq1f1b-splits 1"
            )


class BatchItem:
    """One item of the data iterator, handed out as it was fetched however often it is asked for.

    Once a script has changed a tensor in place, copies are handed out of all as they were, which
    share memory where the originals do.
    """

    def __init__(self, item: Any, *, protect: bool) -> None:
        self._leaves, self._structure = pytree.tree_flatten(item)
        self._versions = [_version(leaf) for leaf in self._leaves]
        kept = [leaf if _is_protected(leaf) else None for leaf in self._leaves]
        self._kept = copy.deepcopy(kept) if protect else []

    def handed_out(self) -> Any:
        """Return the item, whose containers are new."""
        leaves = self._leaves
        changed = [
            leaf
            for leaf, version in zip(leaves, self._versions, strict=True)
            if _version(leaf) != version
        ]
        if changed:
            if not all(map(_is_protected, changed)):
                raise DataError(
                    "the forward step changes an attention mask of its batch in place, so the same "
                    "micro-batch cannot be used for several sub-sequences: clone the mask first, "
                    "or use --seq1f1b-splits 1"
                )
            kept = copy.deepcopy(self._kept)
            leaves = [
                own if copied is None else copied for own, copied in zip(leaves, kept, strict=True)
            ]
        return pytree.tree_unflatten(leaves, self._structure)


def _version(leaf: Any) -> int | None:
    """Count changes in place; None where they are not counted."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def _is_protected(leaf: Any) -> bool:
    """Whether a copy is kept: of all tensors but masks of all pairs of tokens, which are large."""
    if _version(leaf) is None:
        return False
    return not (leaf.dim() >= 3 and leaf.shape[-1] == leaf.shape[-2])


class BatchCutter:
    """Cuts batches to the running sub-sequence, and remembers what each tensor was cut from.

    in_feed: the forward steps (whether they train, model chunk) whose batches are cut before they
    get them, since they call nothing that cuts. was_asked: whether a batch was cut since the
    running action began.
    """

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        self._wholes: list[tuple[Tensor, Tensor]] = []
        self.in_feed: set[tuple[bool, int]] = set()
        self.was_asked = False

    def cut_item(self, item: Any) -> Any:
        """Return the running sub-sequence's part of an item of a data iterator.

        Raises DataError unless the item is a dictionary.
        """
        if self._context.cut_part is None:
            return item
        if not isinstance(item, dict):
            raise DataError(
                f"the data iterator delivers {type(item).__name__}, which cannot be cut to "
                "sub-sequences: deliver dictionaries of tensors, pass each batch through "
                "get_batch_on_this_cp_rank, or use --seq1f1b-splits 1"
            )
        return self.cut(item)

    def cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the running sub-sequence's part of ``batch``, or all of it if nothing is cut.

        Raises ValueError for a mask that is not the one sub-sequences attend by, and for a tensor
        whose sequence dimension cannot be told.
        """
        self.was_asked = True
        part = self._context.cut_part
        if part is None:
            return batch
        cut = {key: self._cut_entry(key, value, part) for key, value in batch.items()}
        if batch.get(_MASK) is not None:
            check_mask(batch[_MASK], self._context.running_documents)
        # Sub-sequences attend causally to their prefix, without a mask.
        cut[_MASK] = None
        return cut

    def forget(self) -> None:
        """A new action begins; nothing has been cut for it yet."""
        self._wholes, self.was_asked = [], False

    def remember(self, cut: Tensor, whole: Tensor) -> None:
        """Make ``whole_of(cut)`` return ``whole`` until the next action."""
        self._wholes.append((cut, whole))

    def whole_of(self, tensor: Tensor) -> Tensor | None:
        """Return what ``tensor`` was cut from, ``[b, total]``; None if it was not cut here."""
        return next((whole for cut, whole in self._wholes if cut is tensor), None)

    def _cut_entry(self, key: str, value: Any, part: SubSequence) -> Any:
        if key in _UNCUT or key == _MASK:
            return value
        return pytree.tree_map_only(
            Tensor, lambda tensor: self._cut_tensor(key, tensor, part), value
        )

    def _cut_tensor(self, key: str, tensor: Tensor, part: SubSequence) -> Tensor:
        dim = sequence_dim(tensor.shape, part.total, name=key)
        if dim is None:
            return tensor
        cut = tensor.narrow(dim, part.start, part.length).contiguous()
        self.remember(cut, tensor)
        return cut


def sequence_dim(shape: Sequence[int], total: int, *, name: str) -> int | None:
    """Return which dimension of a tensor counts the ``total`` tokens of a sequence; None if none.

    Tensors of a batch are ``[b, s, ...]`` as a rule; ``[s, b, h]`` of embeddings, ``[3, b, s]`` of
    M-RoPE's positions and ``[s]`` are recognised where no other dimension is as long. Raises
    ValueError where several are.
    """
    found = [dim for dim, size in enumerate(shape) if size == total]
    if not found:
        return None
    if len(shape) == 2 and found == [0, 1]:
        return 1
    if len(found) > 1:
        raise ValueError(
            f"{name!r} of the batch has shape {list(shape)}, of which several dimensions are as "
            f"long as the sequence of {total} tokens: sub-sequences cannot cut it; leave it out, "
            "or use --seq1f1b-splits 1"
        )
    return found[0]
