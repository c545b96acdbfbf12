"""The loss of a micro-batch that arrives in sub-sequences, normalised by all its tokens.

Megatron's loss functions return (summed loss, number of tokens, report), and the schedule divides
by the number of tokens. One sub-sequence does not know the tokens of those to come; but its
gradient is not asked for before all of them have been through the last stage, so the division is
put off to the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.adaptor.batch import BatchCutter
from seq1f1b.schedule import Action

Report = dict[str, Any]


class _DivideInBackward(torch.autograd.Function):
    """Identity whose gradient is divided by ``divisor`` as it is when the gradient comes."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, divisor: Tensor) -> Tensor:
        ctx.divisor = divisor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        # No token counts, no loss: the gradient is 0.
        return grad_output / (ctx.divisor + (ctx.divisor == 0)), None


class TokenExactLoss:
    """Wraps the loss functions of one step's sub-sequences and merges their reports.

    ``num_shares`` ranks of context parallelism have the tokens of a sub-sequence among them.
    """

    def __init__(self, cutter: BatchCutter, *, per_token: bool, num_shares: int = 1) -> None:
        self._cutter = cutter
        self._per_token = per_token
        self._num_shares = num_shares
        self._num_tokens: dict[int, Tensor] = {}
        self._reports: dict[int, Report] = {}

    def wrap(self, action: Action, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``loss_function`` for the sub-sequence of ``action``.

        A pair (mean loss, report), Megatron's older contract, is weighted by the sub-sequence's
        share of the micro-batch's unmasked tokens. With ``--calculate-per-token-loss`` nothing is
        divided here, as Megatron divides by the tokens of the whole step.
        """

        def sub_sequence_loss(output: Tensor, **kwargs: Any) -> Any:
            outputs = loss_function(output, **kwargs)
            if kwargs.get("non_loss_data"):
                return outputs
            if len(outputs) == 2:
                loss, report = outputs
                weight = self._cutter.weight()
                return loss * weight, {k: _weighted(v, weight) for k, v in report.items()}
            loss, num_tokens, report = outputs
            if self._per_token:
                return loss, num_tokens, report
            divisor = self._divisor(action, num_tokens)
            return _DivideInBackward.apply(loss, divisor), torch.ones_like(num_tokens), report

        return sub_sequence_loss

    def _divisor(self, action: Action, num_tokens: Tensor) -> Tensor:
        """Return what will be, when gradients come, this rank's share of the micro-batch's tokens.

        Gradients are averaged over the ranks of context parallelism, whose tokens count unequally.
        """
        whole = self._cutter.num_tokens() if self._num_shares > 1 else None
        if whole is not None:
            return whole / self._num_shares
        total = self._num_tokens.setdefault(action.micro_batch, torch.zeros_like(num_tokens))
        total += num_tokens
        return total

    def collect(self, action: Action, report: Any) -> None:
        """Add what the sub-sequence of ``action`` reported to its micro-batch's report."""
        earlier = self._reports.get(action.micro_batch)
        if earlier is None:
            self._reports[action.micro_batch] = report
        elif isinstance(report, dict):
            self._reports[action.micro_batch] = {k: earlier[k] + report[k] for k in report}
        else:
            self._reports[action.micro_batch] = torch.cat((earlier, report), dim=1)

    @property
    def reports(self) -> list[Any]:
        """One report per micro-batch, as Megatron's own schedules return them."""
        return [self._reports[micro_batch] for micro_batch in sorted(self._reports)]


def _weighted(value: Tensor, weight: Tensor | float) -> Tensor:
    """Weight a mean; pairs (sum, count) add up as they are."""
    return value if value.numel() == 2 else value * weight
