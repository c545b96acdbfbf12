"""Auxiliary losses of a mixture of experts, those of the whole micro-batch though it comes in cuts.

The load-balancing loss of a micro-batch of T tokens (arXiv 2101.03961, equations 4 to 6) is

    coefficient * E / (k T^2) * sum over experts e of  tokens_e * probs_e

where tokens_e counts the tokens that the router sends to e, probs_e adds the probabilities of e
over all tokens, and k is how many experts a token goes to. It is no sum over sub-sequences. But its
gradient is linear in what a sub-sequence adds to probs_e, with tokens_e as the slope, and when the
first backward of a micro-batch comes, all of its forwards are done and tokens_e is known. So every
sub-sequence gets the exact gradient; the value is logged with the last one's.

The router's z-loss is a mean over tokens, to which each sub-sequence adds its share.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seq1f1b.runtime import ExecutionContext
from seq1f1b.schedule import Kind


class _Balance:
    """What the sub-sequences of one micro-batch have brought to one router's loss.

    Kept by sub-sequence, so that a recomputed forward counts once.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, Tensor] = {}
        self.probs: dict[int, Tensor] = {}
        self.totals: dict[int, Any] = {}

    def slope(self, factor: float) -> Tensor:
        """Return the derivative of the loss by probs_e, ``[experts]``."""
        total = sum(self.totals.values())
        return sum(self.tokens.values()) * (factor / (total * total))

    def value(self, factor: float) -> Tensor:
        """Return the loss of all sub-sequences so far."""
        return (self.slope(factor) * sum(self.probs.values())).sum()


class _BalanceLoss(torch.autograd.Function):
    """Gives ``value`` forward; backward the micro-batch's gradient, whose slope is known then."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, value: Tensor, slope: Callable[[], Tensor]) -> Tensor:
        ctx.like, ctx.slope = probs, slope
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        slope = (grad_output * ctx.slope()).to(ctx.like.dtype)
        return slope.expand_as(ctx.like), None, None


class _Share(torch.autograd.Function):
    """Scales the value by one factor and the gradient by another."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, of_value: float, of_gradient: float) -> Tensor:
        ctx.of_gradient = of_gradient
        return loss * of_value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output * ctx.of_gradient, None, None


class RouterLosses:
    """Replaces the losses that routers add, while sub-sequences run."""

    def __init__(self, context: ExecutionContext) -> None:
        self._context = context
        self._router: Any = None
        self._balances: dict[Any, _Balance] = {}

    def forget(self) -> None:
        """A new step begins."""
        self._balances.clear()

    def method(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method of the router that lets the loss functions know whose loss it is."""

        def apply_loss(router: Any, *args: Any, **kwargs: Any) -> Any:
            self._router = router
            try:
                return original(router, *args, **kwargs)
            finally:
                self._router = None

        return apply_loss

    def routing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``TopKRouter.routing`` that counts tokens also where a forward is recomputed.

        Routers leave their losses out while gradients are off, as in the forward of a layer that
        the backward will recompute. That would be too late for the counts of all sub-sequences.
        """

        def routing(router: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not (router.training and self._runs_cut_forward) or torch.is_grad_enabled():
                return original(router, logits, *args, **kwargs)
            with torch.enable_grad():
                results = original(router, logits.detach(), *args, **kwargs)
            return tuple(result.detach() for result in results)

        return routing

    @property
    def _runs_cut_forward(self) -> bool:
        part, action = self._context.cut_part, self._context.action
        return part is not None and action is not None and action.kind is Kind.F

    def balance(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``switch_load_balancing_loss_func`` of the whole micro-batch."""

        def switch_load_balancing_loss_func(
            probs: Tensor,
            tokens_per_expert: Tensor,
            total_num_tokens: Any,
            topk: int,
            num_experts: int,
            moe_aux_loss_coeff: float,
            **kwargs: Any,
        ) -> Tensor:
            part, action = self._context.cut_part, self._context.action
            if part is None or action is None:
                return original(
                    probs,
                    tokens_per_expert,
                    total_num_tokens,
                    topk,
                    num_experts,
                    moe_aux_loss_coeff,
                    **kwargs,
                )
            router = self._router
            owner = action.chunk, action.micro_batch, router
            balance = self._balances.setdefault(owner, _Balance())
            balance.tokens[part.index] = tokens_per_expert.detach()
            balance.probs[part.index] = probs.detach().sum(dim=0)
            balance.totals[part.index] = total_num_tokens
            factor = num_experts * moe_aux_loss_coeff / topk
            logs = part.is_last and self._runs_cut_forward
            value = balance.value(factor) if logs else probs.new_zeros(())

            def slope() -> Tensor:
                # Megatron multiplies by this sub-sequence's tokens, where it should be by all.
                whole = sum(balance.totals.values()) / total_num_tokens
                return balance.slope(factor * (whole if router.calculate_per_token_loss else 1))

            return _BalanceLoss.apply(probs, value, slope)

        return switch_load_balancing_loss_func

    def z_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``z_loss_func`` weighted by the running sub-sequence's share of the tokens."""

        def z_loss_func(*args: Any, **kwargs: Any) -> Tensor:
            loss, part = original(*args, **kwargs), self._context.cut_part
            if part is None:
                return loss
            share = part.length / part.total
            logged = share if self._runs_cut_forward else 0.0
            per_token = self._router.calculate_per_token_loss
            return _Share.apply(loss, logged, 1.0 if per_token else share)

        return z_loss_func
