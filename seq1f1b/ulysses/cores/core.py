"""What an attention core offers."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from seq1f1b.ulysses.cores.scope import Options, Scope


class Core(ABC):
    """Attention of one unit of work.

    Shapes: q ``[b, heads, queries, k dim]``, k ``[b, kv heads, keys, k dim]``, v
    ``[b, kv heads, keys, v dim]``, where heads is a multiple of kv heads and ``scope`` says which
    key each query sees; sinks, if any, ``[heads]``: a score per head that takes part in the softmax
    and has no value.
    """

    name: str

    @abstractmethod
    def refusal(
        self, q: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
    ) -> str:
        """Return why this core cannot compute it; an empty string if it can."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output ``[b, heads, queries, v dim]`` and what the backward needs besides.

        Rows of padding may hold anything finite.
        """

    @abstractmethod
    def backward(
        self,
        grad_output: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        output: Tensor,
        saved: tuple[Tensor, ...],
        scope: Scope,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the gradients of q, k, v and sinks."""


def attend(
    core: Core,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    scope: Scope,
    options: Options,
) -> Tensor:
    """Return the core's output as autograd sees it; shapes are those of ``Core``."""
    return _Attend.apply(core, q, k, v, sinks, scope, options)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        core: Core,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        scope: Scope,
        options: Options,
    ) -> Tensor:
        output, saved = core.forward(q, k, v, sinks, scope, options)
        ctx.save_for_backward(q, k, v, sinks, output, *saved)
        ctx.core, ctx.scope, ctx.options = core, scope, options
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        q, k, v, sinks, output, *saved = ctx.saved_tensors
        grads = ctx.core.backward(
            grad_output, q, k, v, sinks, output, tuple(saved), ctx.scope, ctx.options
        )
        return None, *grads, None, None
