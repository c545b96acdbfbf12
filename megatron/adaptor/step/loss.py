"""The loss of a micro-batch that arrives in sub-sequences, computed once, on all of it.

On the last stage the last sub-sequence's forward comes before any gradient of its micro-batch is
asked for. So the model's outputs are kept, and after the last sub-sequence the script's forward
step runs once more on the uncut batch, with a model that answers with the joined outputs. Its loss
function may then be any function of them, as with one split: a mean, a weighted or narrowed sum, a
loss of whole sequences. Its gradient with respect to the outputs is dealt out to the sub-sequences,
whose backwards begin with it. That keeps outputs, never activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from megatron.adaptor.step.model_calls import ModelCall
from megatron.adaptor.step.shards import Shards
from seq1f1b.errors import Seq1F1BError
from seq1f1b.sequence import SubSequence


class LossError(Seq1F1BError, ValueError):
    """A loss that cannot be computed from the outputs of sub-sequences."""


@dataclass(frozen=True)
class WholeLoss:
    """Loss, number of tokens and report of a micro-batch, as Megatron's loops would have them.

    value: divided as Megatron divides it.
    """

    value: Tensor
    num_tokens: Tensor
    report: Any


@dataclass(frozen=True)
class _Joined:
    """One entry of the model's output for a whole micro-batch; tokens are counted along ``dim``."""

    value: Any
    dim: int


@dataclass
class _Outputs:
    """The model's calls for one micro-batch's sub-sequences, and what becomes of their outputs."""

    calls: list[ModelCall] = field(default_factory=list)
    joined: list[_Joined] = field(default_factory=list)
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    shards: Shards = field(init=False)

    @property
    def roots(self) -> list[Tensor]:
        """Joined tensors that have gradients."""
        return [leaf.value for leaf in self.joined if _has_gradient(leaf.value)]


class Losses:
    """Joins outputs of sub-sequences and deals gradients out, for the micro-batches of one step.

    micro_batch_size: b. per_token: whether Megatron divides by the tokens of the whole step (then
    nothing is divided here). num_micro_batches: of the step, by which Megatron divides.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        per_token: bool,
        context_group: Any,
        trains: bool,
    ) -> None:
        self._micro_batch_size = micro_batch_size
        self._num_micro_batches = num_micro_batches
        self._per_token = per_token
        self._context_group = context_group
        self._trains = trains
        self._outputs: dict[int, _Outputs] = {}

    def add(self, micro_batch: int, call: ModelCall) -> Tensor:
        """Keep the output of the next sub-sequence; return the scalar whose backward starts there.

        Its gradient is known after ``finish``.
        """
        outputs = self._outputs.setdefault(micro_batch, _Outputs())
        outputs.calls.append(call)
        index = len(outputs.calls) - 1
        leaves = [leaf for leaf in pytree.tree_leaves(call.output) if isinstance(leaf, Tensor)]
        if not self._trains:
            return torch.zeros([], device=leaves[0].device if leaves else None)
        # Megatron divides the zero by the number of micro-batches, if not by the step's tokens.
        scale = 1 if self._per_token else self._num_micro_batches
        return _GradientOfLoss.apply(lambda: outputs.gradients[index], scale, *leaves)

    def join(self, micro_batch: int, parts: Sequence[SubSequence]) -> Any:
        """Return the model's output for a micro-batch whose sub-sequences all have been added.

        All ranks of context parallelism must call. Raises LossError when outputs cannot be joined.
        """
        outputs = self._outputs[micro_batch]
        outputs.shards = Shards(parts, self._context_group)
        pieces = [pytree.tree_flatten(call.output) for call in outputs.calls]
        columns = zip(*(leaves for leaves, _ in pieces), strict=True)
        outputs.joined = [self._join(column, outputs.shards) for column in columns]
        if self._trains:
            for leaf in outputs.roots:
                leaf.requires_grad_()
        leaves = [_for_script(leaf.value) for leaf in outputs.joined]
        return pytree.tree_unflatten(leaves, pieces[0][1])

    def drop(self, micro_batch: int) -> None:
        """Forget a micro-batch that has no loss."""
        del self._outputs[micro_batch]

    def counted(self, loss: WholeLoss) -> Tensor:
        """Return the tokens by which Megatron divides the step: none without per-token loss."""
        return loss.num_tokens if self._per_token else torch.zeros_like(loss.num_tokens)

    def calls(self, micro_batch: int) -> Sequence[ModelCall]:
        """Return the calls of a micro-batch's sub-sequences."""
        return self._outputs[micro_batch].calls

    def finish(self, micro_batch: int, outputs: Any) -> WholeLoss:
        """Return the loss of a micro-batch and leave its gradients to the sub-sequences' backwards.

        outputs: what the script's loss function returned for the joined output.
        """
        kept = self._outputs.pop(micro_batch)
        loss = self._scaled(outputs)
        if self._trains:
            kept.gradients = self._gradients(loss.value, kept)
        kept.joined = []
        return loss

    def _gradients(self, value: Tensor, kept: _Outputs) -> list[list[Tensor | None]]:
        """Return for each sub-sequence the gradients of its outputs."""
        if not value.requires_grad:
            raise LossError(
                "the loss does not depend on the model's output: it has no gradient to train with"
            )
        of_roots = iter(torch.autograd.grad(value, kept.roots, allow_unused=True))
        dealt = [
            _deal(next(of_roots), leaf, kept.shards)
            if _has_gradient(leaf.value)
            else [None] * len(kept.calls)
            for leaf in kept.joined
            if isinstance(leaf.value, Tensor)
        ]
        return [list(of_part) for of_part in zip(*dealt, strict=True)]

    def _join(self, pieces: Sequence[Any], shards: Shards) -> "_Joined":
        if not isinstance(pieces[0], Tensor):
            if any(piece != pieces[0] for piece in pieces[1:]):
                raise LossError(
                    f"the model's output holds {pieces[0]!r} for one sub-sequence and "
                    f"{pieces[-1]!r} for another: return tensors [b, s, ...], or use "
                    "--seq1f1b-splits 1"
                )
            return _Joined(pieces[0], 0)
        dim = self._sequence_dim(pieces, shards.own_lengths)
        if dim is None:
            raise LossError(
                f"the model's output has shape {list(pieces[0].shape)} for a sub-sequence of "
                f"{shards.own_lengths[0]} tokens, and no dimension that counts them: return losses "
                "or logits of each token, [b, s, ...], and reduce them in the loss function, or "
                "use --seq1f1b-splits 1"
            )
        whole = torch.cat([piece.detach() for piece in pieces], dim)
        return _Joined(shards.as_one_split(whole, dim), dim)

    def _sequence_dim(self, pieces: Sequence[Tensor], lengths: Sequence[int]) -> int | None:
        """Return the dimension along which every piece has its sub-sequence's length."""
        found = [
            dim
            for dim in range(pieces[0].dim())
            if all(
                piece.dim() > dim and piece.shape[dim] == length
                for piece, length in zip(pieces, lengths, strict=True)
            )
        ]
        if 1 in found and pieces[0].shape[0] == self._micro_batch_size:
            return 1
        return found[0] if found else None

    def _scaled(self, outputs: Any) -> WholeLoss:
        """Divide a loss as Megatron's ``forward_step_calc_loss`` does, in place as there."""
        if len(outputs) == 3:
            value, num_tokens, report = outputs
            if not self._per_token:
                value /= self._divisor(num_tokens)
                value /= self._num_micro_batches
            return WholeLoss(value, num_tokens, report)
        value, report = outputs
        value *= self._num_ranks
        value /= self._num_micro_batches
        return WholeLoss(value, torch.zeros([], dtype=torch.int), report)

    @property
    def _num_ranks(self) -> int:
        return self._context_group.size()

    def _divisor(self, num_tokens: Tensor) -> Tensor:
        """Return this rank's share of the micro-batch's tokens.

        Gradients are averaged over the ranks of context parallelism, whose tokens may count
        unequally; the mean over all tokens is the same however they are dealt to ranks.
        """
        if self._num_ranks == 1:
            return torch.clamp(num_tokens, min=1)
        total = num_tokens.clone()
        torch.distributed.all_reduce(total, group=self._context_group)
        return torch.clamp(total, min=1) / self._num_ranks


def _for_script(value: Any) -> Any:
    """Return a tensor that a script may change in place; logits, which are large, as they are."""
    return value.clone() if isinstance(value, Tensor) and value.dim() <= 2 else value


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _deal(gradient: Tensor | None, joined: _Joined, shards: Shards) -> list[Tensor | None]:
    if gradient is None:
        gradient = torch.zeros_like(joined.value)
    own = shards.as_sub_sequences(gradient, joined.dim)
    return [piece.contiguous() for piece in own.split(list(shards.own_lengths), joined.dim)]


class _GradientOfLoss(torch.autograd.Function):
    """A zero that stands for the loss; backward the gradients that its computation has left.

    ``scale`` undoes Megatron's division of the zero by the number of micro-batches, which the
    gradients contain already.
    """

    @staticmethod
    def forward(
        ctx: Any, gradients: Callable[[], list[Any]], scale: int, *outputs: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        factor = grad_output * ctx.scale
        return (
            None,
            None,
            *(None if gradient is None else gradient * factor for gradient in ctx.gradients()),
        )
