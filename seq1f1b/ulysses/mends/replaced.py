"""Replace a module's forward, or a function in a file of code, and keep the original."""

import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_MARK = "seq1f1b_original"


def replace_forward(module: nn.Module, replacement: Callable[..., Any]) -> None:
    """Let ``module.forward(...)`` call ``replacement(original, module, ...)``.

    Bound methods follow the module when it is copied, which closures over it would not.
    """
    if _MARK in vars(module):
        return
    own = vars(module).get("forward")
    vars(module)[_MARK] = MethodType(type(module).forward, module) if own is None else own
    function = type(module).forward

    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return replacement(vars(self)[_MARK], self, *args, **kwargs)

    vars(module)["forward"] = MethodType(forward, module)


def replace_function(code: str, name: str, replacement: Callable[..., Any]) -> None:
    """Let function ``name`` of the Python module ``code`` be ``replacement(original, ...)``.

    The replacement must leave calls outside of a dispatched model's forward pass as they are: other
    models use the same function.
    """
    namespace = vars(sys.modules[code])
    original = namespace.get(name)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(replaced, _MARK, original)
    namespace[name] = replaced
