"""Reads Megatron's options from a command line, as Megatron's own parser reads them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, NoReturn

import yaml

from seq1f1b.errors import did_you_mean
from seq1f1b.planner.arguments import Option, options
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.refusals import REFUSED

_ARITY: dict[str, int | str | None] = {"none": 0, "one": None, "many": "+", "three": 3}
_FP32 = "--fp32"
_MOST = 10**12


class Given(NamedTuple):
    """What a command line says: values by field of ``Arguments``, and flags without effect here."""

    values: dict[str, Any]
    ignored: tuple[str, ...]


def read_options(arguments: Sequence[str]) -> Given:
    """Parse Megatron's options.

    A flag of Megatron's that changes neither memory nor time is accepted and listed. Raises
    SettingError for a flag that neither Megatron nor this project has, for one whose effect is not
    modelled, and for a value of another type.
    """
    parser = _parser()
    try:
        namespace, unknown = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise SettingError([f"{error.argument_name}: {error.message}"]) from None
    given = {name: value for name, value in vars(namespace).items() if value is not _UNSET}
    refused = [f"{flag}: {REFUSED[flag]}" for flag in given if flag in REFUSED]
    faults = [*refused, *(_unknown(word) for word in unknown)]
    if faults:
        raise SettingError(faults)
    names = {option.name for option in options()}
    values = {name: _tuples(value) for name, value in given.items() if name in names}
    if _FP32 in given:
        values["bf16"] = values["fp16"] = False
    return Given(
        values, tuple(sorted(flag for flag in given if flag.startswith("--") and flag != _FP32))
    )


def write_options(values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that sets ``values``, in the order of the table."""
    words: list[str] = []
    for option in options():
        if option.name not in values or values[option.name] == option.default:
            continue
        value, flag = values[option.name], option.flags[0]
        if option.type is None:
            words.append(flag)
        elif option.many:
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


class _Unset:
    """Stands for an option that is not on the command line."""


_UNSET = _Unset()


class _Parser(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise SettingError([message])


@cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in options():
        _add(parser, option)
    parser.add_argument(_FP32, dest=_FP32, action="store_true", default=_UNSET)
    taken = set(parser._option_string_actions)
    for flag in REFUSED:
        parser.add_argument(flag, dest=flag, nargs="*", default=_UNSET)
        taken.add(flag)
    for arity, flags in unread_flags().items():
        for flag in flags:
            if flag in taken:
                continue
            if arity == "none":
                parser.add_argument(flag, dest=flag, action="store_true", default=_UNSET)
            else:
                nargs: Any = _ARITY[arity]
                parser.add_argument(flag, dest=flag, nargs=nargs, default=_UNSET)
    return parser


@cache
def unread_flags() -> dict[str, list[str]]:
    """Return Megatron's flags without effect here, by how many values they take."""
    text = files("seq1f1b.planner").joinpath("data/megatron_flags.yaml").read_text("utf-8")
    return {name: flags for name, flags in yaml.safe_load(text).items() if name != "megatron"}


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    if option.type is None:
        action = "store_false" if option.default is True else "store_true"
        parser.add_argument(*option.flags, dest=option.name, action=action, default=_UNSET)
        return
    parser.add_argument(
        *option.flags,
        dest=option.name,
        type=_bounded(option.type),
        choices=option.choices,
        nargs="+" if option.many else None,
        default=_UNSET,
    )


def _bounded(kind: type) -> Callable[[str], Any]:
    """Return what reads a value; infinite numbers and larger ones than any size are errors."""

    def read(text: str) -> Any:
        value = kind(text)
        if isinstance(value, int | float) and not abs(value) <= _MOST:
            raise ValueError
        return value

    read.__name__ = kind.__name__  # which argparse says that a value is not of
    return read


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unknown(word: str) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no option"
    flag = word.split("=")[0]
    known = [name for name in _parser()._option_string_actions if name.startswith("--")]
    hint = did_you_mean(flag, known)
    return f"{flag}: neither Megatron nor this project has this option{hint}"
