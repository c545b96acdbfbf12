"""Short causal convolutions: a halo of earlier tokens, cut off where documents begin."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from seq1f1b.ulysses.mends.replaced import replace_function
from seq1f1b.ulysses.run import Run, current_run
from seq1f1b.ulysses.units import Block


def mend_convolutions(model: nn.Module) -> None:
    """Replace ``causal_conv1d_fn`` in the code of every layer that can call it."""
    for code in {type(module).__module__ for module in model.modules()}:
        replace_function(code, "causal_conv1d_fn", _convolve)


def _convolve(
    original: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """Convolve ``x [b, channels, shard]`` with ``weight [channels, taps]`` over whole rows."""
    run = current_run()
    if run is None:
        return original(x, weight, bias, activation=activation, **kwargs)
    run.check_length(x.shape[2], "a causal convolution")
    run.refuse_parts("a causal convolution")
    run.num_mixed += 1
    taps = weight.shape[-1]
    if run.is_closed:
        return _by_taps(x, weight[:, -1:], bias, activation, None)
    longer = torch.cat([halo(run, x, taps - 1), x], dim=2)
    before = longer.shape[2] - run.shard
    if not bool(run.rows.is_packed.any()):
        return original(longer, weight, bias, activation=activation)[:, :, before:]
    longer = pad(longer, (taps - 1 - before, 0))
    reach = run.on(x.device, "reach", lambda: _reach(run))
    return _by_taps(longer, weight, bias, activation, reach)


def halo(run: Run, x: Tensor, width: int) -> Tensor:
    """Return the ``width`` tokens before the shard's first, fewer at the start of the rows.

    x: ``[b, channels, shard]``; returns ``[b, channels, at most width]``.
    """
    if run.parallel.size == 1:
        return x[:, :, :0]
    begins = [rank * run.shard for rank in range(run.parallel.size)]
    route = [[Block(0, 1, max(begin - width, 0), begin)] for begin in begins]
    ((block,),), token = run.exchange.to_blocks([x.transpose(1, 2)[:, None]], [route])
    return block[:, 0].transpose(1, 2) + token


def _reach(run: Run) -> Tensor:
    """Return how many tokens of its document come before each one, ``[b, shard]``."""
    places = torch.arange(run.rows.length)
    return (places - run.rows.starts)[:, run.own]


def _by_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, reach: Tensor | None
) -> Tensor:
    """Convolve tap by tap; a tap further back than ``reach`` sees zero.

    x: ``[b, channels, taps - 1 + n]``; returns ``[b, channels, n]``.
    """
    taps = weight.shape[-1]
    length = x.shape[2] - (taps - 1)
    values = x.to(weight.dtype)
    total = torch.zeros_like(values[:, :, :length])
    for back in range(taps):
        begin = taps - 1 - back
        part = values[:, :, begin : begin + length] * weight[:, begin, None]
        total = total + (part if reach is None else part * (reach >= back)[:, None])
    if bias is not None:
        total = total + bias[:, None]
    if activation is not None:
        from transformers.activations import ACT2FN

        total = ACT2FN[activation](total)
    return total.to(x.dtype)
