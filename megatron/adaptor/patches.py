"""What is replaced in Megatron-Core, by name, and the check that it is what we know."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

SUPPORTED_VERSIONS = ">=0.19.2,<0.20"


class UnsupportedMegatronError(RuntimeError):
    """The Megatron-Core that is installed is not one that the adaptor knows."""


@dataclass(frozen=True)
class Patch:
    """One replacement.

    target: ``module:name`` or ``module:Class.name``. parameters: the parameter names that the
    replacement relies on. replacement: makes the new function from the old one.
    """

    target: str
    parameters: tuple[str, ...]
    reason: str
    replacement: Callable[[Callable[..., Any]], Callable[..., Any]]

    def original(self) -> Callable[..., Any]:
        """Return the upstream function; raises UnsupportedMegatronError if it changed."""
        try:
            owner, name = self._owner()
            function = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise UnsupportedMegatronError(
                complaint(self.target, self.reason, f"is not there ({error})")
            ) from None
        known = inspect.signature(function).parameters
        missing = [name for name in self.parameters if name not in known]
        if missing:
            raise UnsupportedMegatronError(
                complaint(
                    self.target, self.reason, f"has no parameter {', '.join(missing)} any more"
                )
            )
        return function

    def apply(self) -> None:
        """Replace the function where it is defined and wherever it was imported by name."""
        original = self.original()
        replacement = functools.update_wrapper(self.replacement(original), original)
        owner, name = self._owner()
        setattr(owner, name, replacement)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("megatron.") and vars(module).get(name) is original:
                setattr(module, name, replacement)

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
            raise UnsupportedMegatronError(
                complaint(self.target, self.reason, f"is not there ({error})")
            ) from None

    def apply(self) -> None:
        """Set the value."""
        module_name, name = self.target.split(":")
        setattr(importlib.import_module(module_name), name, self.value)


def complaint(target: str, reason: str, what: str) -> str:
    """Say that something of Megatron's is not as it was, why that matters and what to install."""
    return (
        f"{target} of Megatron-Core {installed_version()} {what}; Seq1F1B needs it, as "
        f"it {reason}. Supported versions: megatron-core{SUPPORTED_VERSIONS}"
    )


def installed_version() -> str:
    """Return the version of the Megatron-Core that is imported."""
    from megatron.core.package_info import __shortversion__

    return __shortversion__


def check_version() -> None:
    """Raise UnsupportedMegatronError unless the installed Megatron-Core is a known one."""
    from packaging.specifiers import SpecifierSet

    version = installed_version()
    if Version(version) not in SpecifierSet(SUPPORTED_VERSIONS):
        raise UnsupportedMegatronError(
            f"Megatron-Core {version} is not supported; install megatron-core{SUPPORTED_VERSIONS}"
        )


def apply_all(patches: Sequence[Patch | Attribute]) -> None:
    """Check every patch, then apply them all, so that a mismatch leaves Megatron untouched."""
    check_version()
    for patch in patches:
        patch.original()
    for patch in patches:
        patch.apply()
