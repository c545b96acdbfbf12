"""Does a forward step do the same when it is called again for the same micro-batch?

With sub-sequences a script's forward step runs once per sub-sequence, and on the last stage once
more on the uncut batch. Whatever differs between these calls, because the script draws random
numbers, keeps state or changes its batch after the cut, would silently train on something else than
one split does.
"""

import inspect
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from megatron.adaptor.step.batch_feed import sequence_dim
from megatron.adaptor.step.model_calls import ModelCall
from megatron.adaptor.step.shards import Shards
from seq1f1b.errors import Seq1F1BError
from seq1f1b.sequence import SubSequence

_MASK = "attention_mask"  # checked where the batch is cut, and None from there on
_WAY_OUT = "or use --seq1f1b-splits 1"


class RepetitionError(Seq1F1BError, RuntimeError):
    """A forward step that differs from call to call."""


class InputComparison:
    """Compares the model's inputs for sub-sequences with those for the uncut batch.

    Comparing does not wait for the device; ``check`` does, once per step.
    """

    def __init__(self) -> None:
        self._differences: list[tuple[str, Tensor]] = []

    def add(
        self,
        model: Any,
        calls: Sequence[ModelCall],
        whole: ModelCall,
        parts: Sequence[SubSequence],
        context_group: Any,
        *,
        micro_batch: int,
    ) -> None:
        """Compare the calls of one micro-batch's sub-sequences with that of the uncut batch.

        All ranks of ``context_group`` must call. Raises RepetitionError for a difference that the
        device need not be asked for.
        """
        shards = Shards(parts, context_group)
        expected = _inputs(model, whole)
        given = [_inputs(model, call) for call in calls]
        for name in dict.fromkeys([*expected, *(name for inputs in given for name in inputs)]):
            if name.startswith(_MASK):
                continue
            values = [inputs.get(name) for inputs in given]
            where = f"micro-batch {micro_batch}: {name!r}"
            self._compare(where, name, values, expected.get(name), shards)

    def check(self) -> None:
        """Raise RepetitionError for the first difference found since the last call."""
        found, self._differences = self._differences, []
        if not found:
            return
        for (where, _), differs in zip(
            found, torch.stack([flag for _, flag in found]).tolist(), strict=True
        ):
            if differs:
                _refuse(where)

    def _compare(
        self, where: str, name: str, values: Sequence[Any], expected: Any, shards: Shards
    ) -> None:
        if not isinstance(expected, Tensor):
            comparable = isinstance(expected, bool | float | str | type(None))
            if comparable and any(value != expected for value in values):
                _refuse(where)
            return
        if not all(isinstance(value, Tensor) for value in values):
            _refuse(where)
        dim = sequence_dim(expected.shape, sum(shards.own_lengths), name=name)
        if dim is None:
            pieces: Sequence[Tensor] = [expected] * len(values)
        else:
            own = shards.as_sub_sequences(expected, dim)
            pieces = own.split(list(shards.own_lengths), dim)
        for value, piece in zip(values, pieces, strict=True):
            if value.shape != piece.shape:
                _refuse(where)
            self._differences.append((where, _differ(value, piece)))


class DrawWatch:
    """Raises RepetitionError when a forward step draws random numbers outside of its model.

    Call ``boundary`` before and after the model's call, and ``finish`` at the end.
    """

    def __init__(self) -> None:
        self._state = _random_state()
        self._in_model = False

    def boundary(self) -> None:
        """The model's call begins, or has ended."""
        if self._in_model:
            self._state = _random_state()
        else:
            self.finish()
        self._in_model = not self._in_model

    def finish(self) -> None:
        """The forward step has ended."""
        if _random_state() != self._state:
            raise RepetitionError(
                "the forward step draws random numbers, so it does not do the same for each "
                f"sub-sequence of a micro-batch: draw them where the data is loaded, {_WAY_OUT}"
            )


def check_same_loss(first: Any, second: Any) -> None:
    """Raise RepetitionError unless two calls of a loss function returned the same.

    Values are compared to the rounding that sums in another order bring.
    """
    if not _same(first, second):
        raise RepetitionError(
            "the loss of a micro-batch differs when the forward step and its loss function are "
            "called twice on the same outputs, so they keep state or draw random numbers: keep "
            f"them free of both, {_WAY_OUT}"
        )


def copied(outputs: Any) -> Any:
    """Return what a loss function returned, cloned before it is divided in place."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), outputs)


def _same(first: Any, second: Any) -> bool:
    (a, a_structure), (b, b_structure) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    if a_structure != b_structure:
        return False
    return all(
        torch.allclose(x.double(), y.double(), rtol=1e-5, atol=0.0, equal_nan=True)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else isinstance(x, Tensor) == isinstance(y, Tensor)
        for x, y in zip(a, b, strict=True)
    )


def _refuse(where: str) -> None:
    raise RepetitionError(
        f"{where} of the model's inputs differs between the sub-sequences and the whole batch: the "
        "forward step changes it after get_batch_on_this_cp_rank, by its position or from call to "
        f"call. Change it before that call, or where the data is loaded, {_WAY_OUT}"
    )


def _inputs(model: Any, call: ModelCall) -> dict[str, Any]:
    """Return what a call passes to the model, by name; entries of containers have their own."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    by_name = dict(zip(names, call.args, strict=False)) | call.kwargs
    flat, _ = pytree.tree_flatten_with_path(by_name, is_leaf=lambda value: value is None)
    return {_written(path): value for path, value in flat if value is not None}


def _written(path: Sequence[Any]) -> str:
    first, *rest = path
    return f"{first.key}{pytree.keystr(tuple(rest))}"


def _differ(a: Tensor, b: Tensor) -> Tensor:
    differ = a != b
    if a.is_floating_point():
        differ &= ~(a.isnan() & b.isnan())
    return differ.any()


def _random_state() -> tuple[Any, ...]:
    """Return something that changes whenever a global generator is drawn from."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    # The generator that scripts draw from by np.random.rand and its like.
    name, keys, place, *rest = np.random.get_state()  # noqa: NPY002
    numpy = name, np.asarray(keys).tobytes(), place, *rest
    return (random.getstate(), numpy, *(state.numpy().tobytes() for state in states))
