"""Watch a forward step call its model, or answer in the model's place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]


@dataclass(frozen=True)
class ModelCall:
    """Arguments and output of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@contextmanager
def observed(model: Any, boundary: Callable[[], None] = lambda: None) -> Iterator[list[ModelCall]]:
    """Collect the calls of ``model``, or of what it wraps, that happen inside.

    ``boundary`` is called before and after each.
    """
    calls: list[ModelCall] = []
    depth = 0

    def around(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                boundary()
            depth += 1
            try:
                output = original(*args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                boundary()
                calls.append(ModelCall(args, kwargs, output))
            return output

        return forward

    with _replaced_forwards(model, around):
        yield calls


@contextmanager
def answered(model: Any, output: Any) -> Iterator[list[ModelCall]]:
    """Collect the calls of ``model`` inside, each of which returns ``output`` and computes nothing.

    The model stays the object that it is, so scripts may unwrap it and read its attributes.
    """
    calls: list[ModelCall] = []

    def around(original: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(ModelCall(args, kwargs, output))
            return output

        return forward

    with _replaced_forwards(model, around):
        yield calls


@contextmanager
def _replaced_forwards(model: Any, around: Callable[[Forward], Forward]) -> Iterator[None]:
    """Wrap ``forward`` of ``model`` and of every module that it wraps, while this is open."""
    replaced: list[tuple[nn.Module, Any]] = []
    module = model
    try:
        while isinstance(module, nn.Module):
            replaced.append((module, vars(module).get("forward")))
            vars(module)["forward"] = around(module.forward)
            module = getattr(module, "module", None)
        yield
    finally:
        for module, own in replaced:
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
