"""From the arguments of a model's call to the group's rows and what the model itself gets."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seq1f1b.ulysses.batch import positions_of
from seq1f1b.ulysses.errors import CallError
from seq1f1b.ulysses.labels import IGNORED, ShiftedLabels, expand_rows, unmark
from seq1f1b.ulysses.mesh import SequenceParallel
from seq1f1b.ulysses.rows import Rows
from seq1f1b.ulysses.signature import Signature

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Call:
    """A call of a dispatched model: the group's rows and the model's own keyword arguments.

    targets: of the shard, ``[b, shard]``, or None.
    """

    rows: Rows
    arguments: dict[str, Any]
    targets: Tensor | None


def read_call(
    parallel: SequenceParallel,
    signature: Signature,
    arguments: dict[str, Any],
    *,
    keeps_mask: bool,
) -> Call:
    """Check the arguments, fetch the group's positions, and return what the model shall get.

    keeps_mask: whether the model gets its part of the padding mask, or a mask of ones. All ranks
    of the group must call it together. Raises CallError, on every rank alike if it is about what
    ranks were given.
    """
    arguments = dict(arguments)
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if tokens is None:
        raise CallError("a dispatched model needs input_ids or inputs_embeds")
    shape, device = torch.Size(tokens.shape[:2]), tokens.device
    own = slice(parallel.rank * shape[1], (parallel.rank + 1) * shape[1])
    _refuse_generation(arguments)
    mask = _take_mask(arguments, parallel, shape)
    targets = _targets(arguments, shape)
    _check_call(parallel, tokens, mask, targets, arguments)
    positions = _positions(signature, arguments, mask, shape, own, parallel.size).to(device)
    lengths = arguments.get("cu_seq_lens_q")
    for name in _LENGTHS:
        arguments.pop(name, None)
    rows = Rows.read(_gather(parallel, positions), mask, lengths)
    if signature.accepts("position_ids"):
        arguments["position_ids"] = positions
    if signature.accepts("attention_mask"):
        ones = torch.ones(shape, dtype=torch.long, device=device)
        arguments["attention_mask"] = (
            mask[:, own].to(ones) if mask is not None and keeps_mask else ones
        )
    if signature.accepts("use_cache"):
        arguments["use_cache"] = False
    return Call(rows, arguments, targets)


def _refuse_generation(arguments: dict[str, Any]) -> None:
    for name in ("past_key_values", "layer_past"):
        if arguments.get(name) is not None:
            raise CallError(
                f"{name} is given: a dispatched model computes whole sequences, no cache"
            )
    if arguments.get("use_cache"):
        raise CallError(
            "use_cache=True: a dispatched model computes whole sequences and cannot generate. Load "
            "the weights into a model that is not dispatched for that"
        )


def _take_mask(
    arguments: dict[str, Any], parallel: SequenceParallel, shape: torch.Size
) -> Tensor | None:
    mask = arguments.pop("attention_mask", None)
    if mask is None:
        return None
    whole = shape[0], parallel.size * shape[1]
    if not isinstance(mask, Tensor) or tuple(mask.shape) != whole:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise CallError(
            f"attention_mask must be the padding mask of whole rows, {whole}, on every rank, not "
            f"{found}: it is never split, and masks over pairs of tokens are not needed"
        )
    return mask.bool()


def _targets(arguments: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """Return the shard's targets, from ``labels`` or ``shift_labels``."""
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    if labels is not None and shifted is not None:
        raise CallError("labels and shift_labels are both given: pass one of them")
    if labels is None and shifted is None:
        return None
    if labels is not None and not isinstance(labels, ShiftedLabels):
        raise CallError(
            "labels are not shifted: a shard lacks the target of its last token. Pass the labels "
            "that split_for_sequence_parallel(input_ids, labels, position_ids) returns, or shift "
            "whole rows with shift_labels(labels, position_ids) before they are split"
        )
    targets = labels if isinstance(labels, Tensor) else shifted
    assert isinstance(targets, Tensor)
    if targets.shape != shape:
        raise CallError(f"labels {tuple(targets.shape)} and tokens {tuple(shape)} differ")
    return targets


def _check_call(
    parallel: SequenceParallel,
    tokens: Tensor,
    mask: Tensor | None,
    targets: Tensor | None,
    arguments: dict[str, Any],
) -> None:
    """Raise CallError, on all ranks, unless they were given parts of the same sound rows."""
    mark = targets.fingerprint if isinstance(targets, ShiftedLabels) else None
    facts = {
        "sequences": tokens.shape[0],
        "tokens": tokens.shape[1],
        "labels": int(targets is not None),
        "position_ids": int(arguments.get("position_ids") is not None),
        "attention_mask": 0 if mask is None else 1 + int(_checksum(mask)),
        "rows of tokens": 0 if mark is None else int(mark),
    }
    wrong = agree(parallel, tokens.device, facts, _first_padded_target(parallel, targets, mask))
    if wrong >= 0:
        raise CallError(
            f"token {wrong} of a row is padding by attention_mask but has a target: give padding "
            f"the label -100, and pass the mask to pad_for_sequence_parallel too"
        )


def agree(
    parallel: SequenceParallel, device: torch.device, facts: dict[str, int], own: int = -1
) -> int:
    """Return the largest ``own`` of the group's ranks, if they agree about the ``facts``.

    Raises CallError on all ranks if they do not.
    """
    every = [torch.tensor([*facts.values(), own], dtype=torch.long, device=device)]
    if parallel.size > 1:
        mine, every = every[0], [torch.empty_like(every[0]) for _ in range(parallel.size)]
        dist.all_gather(every, mine, group=parallel.group)
    found = torch.stack(every).tolist()
    for rank, theirs in enumerate(found):
        for name, a, b in zip(facts, theirs, found[0], strict=False):
            if a != b:
                raise CallError(
                    f"ranks 0 and {rank} of a sequence-parallel group were given different {name}: "
                    f"all ranks of a group must take the same samples (SequenceParallelSampler), "
                    f"pad and split them alike"
                )
    return max(theirs[-1] for theirs in found)


def _first_padded_target(
    parallel: SequenceParallel, targets: Tensor | None, mask: Tensor | None
) -> int:
    """Return the place in its row of a padded token of this shard that has a target; -1 if none."""
    if targets is None or mask is None:
        return -1
    begin = parallel.rank * targets.shape[1]
    real = mask[:, begin : begin + targets.shape[1]].to(targets.device)
    wrong = ((unmark(targets) != IGNORED) & ~real).any(dim=0).nonzero()
    return begin + int(wrong[0]) if len(wrong) else -1


def _checksum(mask: Tensor) -> Tensor:
    places = torch.arange(1, mask.numel() + 1, device=mask.device)
    return (mask.flatten().long() * places * 40503).sum()


def _positions(
    signature: Signature,
    arguments: dict[str, Any],
    mask: Tensor | None,
    shape: torch.Size,
    own: slice,
    size: int,
) -> Tensor:
    """Return the positions of the shard, ``[b, shard]``: those given, or from its place."""
    given = arguments.get("position_ids")
    if given is not None:
        if given.ndim == 3:
            raise CallError(
                f"position_ids {tuple(given.shape)} have several axes (images or video): only "
                f"text, [batch, tokens], can be shared out"
            )
        try:
            return expand_rows(given, shape, "position_ids")
        except ValueError as error:
            raise CallError(f"{error}; split whole rows with split_for_sequence_parallel") from None
    if mask is not None and signature.positions_follow_mask:
        return (mask.long().cumsum(dim=1) * mask - 1)[:, own]
    lengths = arguments.get("cu_seq_lens_q")
    if lengths is not None:
        return positions_of(lengths, size * shape[1])[:, own]
    return torch.arange(own.start, own.stop).expand(shape)


def _gather(parallel: SequenceParallel, positions: Tensor) -> Tensor:
    """Return the whole rows' positions."""
    if parallel.size == 1:
        return positions
    own = positions.contiguous()
    parts = [torch.empty_like(own) for _ in range(parallel.size)]
    dist.all_gather(parts, own, group=parallel.group)
    return torch.cat(parts, dim=1)
