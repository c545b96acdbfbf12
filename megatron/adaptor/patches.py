"""What is replaced in Megatron-Core, by name, and the check that it is what we know.

A replacement is one plain function. Its first parameter is the original; the others say which
parameters of the original it relies on, at which places; its docstring says why it is needed.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from seq1f1b.errors import Seq1F1BError

SUPPORTED_VERSIONS = ">=0.19.2,<0.20"

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class UnsupportedMegatronError(Seq1F1BError, RuntimeError):
    """The Megatron-Core that is installed is not one that the adaptor knows."""


@dataclass(frozen=True)
class Patch:
    """One replaced function.

    target: ``module:name`` or ``module:Class.name``. replacement: gets the original, then what the
    original is called with.
    """

    target: str
    replacement: Callable[..., Any]

    @property
    def reason(self) -> str:
        """Why it is replaced: the docstring's first sentence."""
        return _first_line(self.replacement)

    def original(self) -> Callable[..., Any]:
        """Return the upstream function; raises UnsupportedMegatronError if it changed."""
        try:
            owner, name = self._owner()
            function = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise _unsupported(self, f"is not there ({error})") from None
        if faults := list(_differences(function, self.replacement)):
            raise _unsupported(self, ", ".join(faults))
        return function

    def apply(self) -> tuple[Any, Any]:
        """Replace the function where it is defined; return it and what took its place."""
        original, replacement = self.original(), self.replacement

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        for extra in ("cache_clear", "cache_info"):  # of functools.lru_cache
            if hasattr(original, extra):
                setattr(call, extra, getattr(original, extra))
        owner, name = self._owner()
        setattr(owner, name, call)
        return original, call

    def _owner(self) -> tuple[Any, str]:
        module_name, path = self.target.split(":")
        owner: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name


@dataclass(frozen=True)
class Attribute:
    """A value, not a function, that is set in a module of Megatron's.

    target: ``module:name``. may_be_missing: whether the module has the name only where some
    package is installed.
    """

    target: str
    value: Any
    reason: str
    may_be_missing: bool = False

    def original(self) -> Any:
        """Return the upstream value; raises UnsupportedMegatronError if there is none."""
        module_name, name = self.target.split(":")
        try:
            module = importlib.import_module(module_name)
            return getattr(module, name, None) if self.may_be_missing else getattr(module, name)
        except (ImportError, AttributeError) as error:
            raise _unsupported(self, f"is not there ({error})") from None

    def apply(self) -> None:
        """Set the value in the module, and nowhere else."""
        module_name, name = self.target.split(":")
        setattr(importlib.import_module(module_name), name, self.value)


def complaint(target: str, reason: str, fault: str) -> str:
    """Return a sentence that says what has changed in Megatron, who relies on it and what to do."""
    return (
        f"{target} of Megatron-Core {installed_version()} {fault}; Seq1F1B needs it: "
        f"{reason} Supported versions: megatron-core{SUPPORTED_VERSIONS}"
    )


def installed_version() -> str:
    """Return the version of the Megatron-Core that is imported."""
    from megatron.core.package_info import __shortversion__

    return __shortversion__


def check_version() -> None:
    """Raise UnsupportedMegatronError unless the installed Megatron-Core is a known one."""
    import megatron.core

    version = installed_version()
    if Version(version) not in SpecifierSet(SUPPORTED_VERSIONS):
        raise UnsupportedMegatronError(
            f"Megatron-Core {version} is not supported; install megatron-core{SUPPORTED_VERSIONS}. "
            f"The version that was found is {megatron.core.__file__}"
        )


def apply_all(patches: Sequence[Patch | Attribute]) -> None:
    """Check every patch, then apply them all, so that a mismatch leaves Megatron untouched."""
    check_version()
    for patch in patches:
        patch.original()
    replaced: dict[int, tuple[Any, Any]] = {}
    for patch in patches:
        if isinstance(patch, Patch):
            original, call = patch.apply()
            replaced[id(original)] = original, call
        else:
            patch.apply()
    _rebind(replaced)


def _rebind(replaced: dict[int, tuple[Any, Any]]) -> None:
    """Replace functions in every loaded module that has imported them, under whatever name."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            new = value
            while id(new) in replaced:
                new = replaced[id(new)][1]
            if new is not value:
                names[name] = new


def _unsupported(patch: Patch | Attribute, fault: str) -> UnsupportedMegatronError:
    return UnsupportedMegatronError(complaint(patch.target, patch.reason, fault))


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _differences(original: Callable[..., Any], replacement: Callable[..., Any]) -> Iterator[str]:
    """Yield what ``replacement`` relies on and ``original`` does not have.

    The instance or class that a method gets may have any name, and a keyword with a default may be
    one that the replacement adds.
    """
    known = inspect.signature(original).parameters
    places = list(known)
    takes_rest = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    relied_on = list(inspect.signature(replacement).parameters.values())[1:]
    for place, parameter in enumerate(relied_on):
        if parameter.kind not in (*_BY_PLACE, *_BY_NAME):
            continue
        name = parameter.name
        if place == 0 and places and places[0] in ("self", "cls"):
            continue
        if name not in known:
            is_optional = takes_rest or parameter.default is not inspect.Parameter.empty
            if not (is_optional and parameter.kind is inspect.Parameter.KEYWORD_ONLY):
                yield f"has no parameter {name} any more"
        elif {parameter.kind, known[name].kind} <= {*_BY_PLACE} and places.index(name) != place:
            yield f"has {name} at place {places.index(name)}, not {place}"
