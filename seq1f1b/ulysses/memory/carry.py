"""The KV carry of one row computed in sub-sequences, one after the other, by one process group."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seq1f1b.ulysses.cores import Core, Options, Scope
from seq1f1b.ulysses.units import Block, Unit


class LayerKeys:
    """Keys and values of one layer's heads that this rank attends with, ``[b, heads, s, dim]``.

    Gradients of earlier sub-sequences' keys and values wait here, in at least float32, for the
    backward of their own sub-sequence.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        def room(x: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*x.shape[:2], length, x.shape[3], dtype=dtype, device=x.device)

        self.keys, self.values = room(keys, keys.dtype), room(values, values.dtype)
        self._room = room
        self._gradients: tuple[Tensor, Tensor] | None = None

    def write(self, part: slice, keys: Tensor, values: Tensor) -> None:
        """Store one sub-sequence's keys and values; writing them again is harmless."""
        self.keys[:, :, part] = keys
        self.values[:, :, part] = values

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """The accumulators, made on first use."""
        if self._gradients is None:
            pair = self.keys, self.values
            wide = [torch.promote_types(x.dtype, torch.float32) for x in pair]
            self._gradients = self._room(pair[0], wide[0]), self._room(pair[1], wide[1])
        return self._gradients


class Carry:
    """All layers' keys and values, by whatever tells layers apart."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._layers: dict[Hashable, LayerKeys] = {}

    def layer(self, key: Hashable, keys: Tensor, values: Tensor) -> LayerKeys:
        """Return one layer's, made on first use for keys and values of these heads and dims."""
        if key not in self._layers:
            self._layers[key] = LayerKeys(keys, values, self._length)
        return self._layers[key]


@dataclass(frozen=True)
class CarriedWork:
    """Units of one sub-sequence on this rank.

    part: the sub-sequence's place in the rows. held: the heads of keys that the carry has.
    """

    layer: LayerKeys
    part: slice
    held: Block
    units: tuple[Unit, ...]
    scope_of: Callable[[Unit], Scope]
    options_of: Callable[[Unit], Options]
    core_for: Callable[..., Core]


def attend_with_carry(
    work: CarriedWork, queries: list[Tensor], keys: Tensor, values: Tensor, sinks: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Return the output of each unit, and a zero to be added to something that has a gradient.

    queries: a block for each unit. keys, values: of the sub-sequence's tokens, for the held heads.
    Through the zero, later sub-sequences' gradients come back even if there is no unit here.
    """
    *outputs, zero = _Carried.apply(work, keys, values, sinks, *queries)
    return outputs, zero


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: CarriedWork,
        keys: Tensor,
        values: Tensor,
        sinks: Tensor | None,
        *queries: Tensor,
    ) -> Any:
        work.layer.write(work.part, keys, values)
        outputs, states = [], []
        for unit, q in zip(work.units, queries, strict=True):
            core, arguments = _call(work, unit, q, sinks)
            output, saved = core.forward(*arguments)
            outputs.append(output)
            states.append(saved)
        ctx.work, ctx.lengths = work, [len(saved) for saved in states]
        flat = (x for saved in states for x in saved)
        ctx.save_for_backward(sinks, *queries, *outputs, *flat)
        return *outputs, keys.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        work: CarriedWork = ctx.work
        sinks, *rest = ctx.saved_tensors
        num = len(work.units)
        queries, outputs, saved = rest[:num], rest[num : 2 * num], iter(rest[2 * num :])
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        of_queries = []
        of_keys, of_values = work.layer.gradients
        for index, unit in enumerate(work.units):
            core, (q, k, v, own, scope, options) = _call(work, unit, queries[index], sinks)
            state = tuple(next(saved) for _ in range(ctx.lengths[index]))
            dq, dk, dv, of_sinks = core.backward(
                grads[index], q, k, v, own, outputs[index], state, scope, options
            )
            heads, rows = _place(work, unit)
            of_keys[:, heads, rows] += dk
            of_values[:, heads, rows] += dv
            of_queries.append(dq)
            if grad_sinks is not None and of_sinks is not None:
                grad_sinks[unit.queries.head : unit.queries.end] += of_sinks
        own_keys, own_values = (x[:, :, work.part] for x in (of_keys, of_values))
        dtype = work.layer.keys.dtype
        return None, own_keys.to(dtype), own_values.to(dtype), grad_sinks, *of_queries


def _place(work: CarriedWork, unit: Unit) -> tuple[slice, slice]:
    """Return where the unit's keys are in the carry: heads and rows."""
    first = work.held.head
    return (
        slice(unit.keys.head - first, unit.keys.end - first),
        slice(unit.keys.start, unit.keys.stop),
    )


def _call(work: CarriedWork, unit: Unit, q: Tensor, sinks: Tensor | None) -> Any:
    """Return the core for a unit and the arguments of its forward."""
    heads, rows = _place(work, unit)
    k, v = work.layer.keys[:, heads, rows], work.layer.values[:, heads, rows]
    own = None if sinks is None else sinks[unit.queries.head : unit.queries.end]
    scope, options = work.scope_of(unit), work.options_of(unit)
    return work.core_for(q, v, own, scope, options), (q, k, v, own, scope, options)
