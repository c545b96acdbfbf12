"""Megatron's options on the commands that take a whole setting."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from seq1f1b.cli.options import flag_error
from seq1f1b.planner.arguments import Option, options
from seq1f1b.planner.catalogue import ScheduleName
from seq1f1b.planner.command_line import Given, read_options
from seq1f1b.planner.errors import DataFileError, SettingError
from seq1f1b.planner.presets import model_options
from seq1f1b.planner.refusals import VISITING
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.setting import Setting

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Leaves Megatron's options to Megatron's rules."""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|PATH",
        help="A model by name (seq1f1b models lists them), or the path of a Hugging Face "
        "config.json; Megatron's options change it.",
        rich_help_panel="Model",
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Number of GPUs.", rich_help_panel="Cluster"),
]
GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME|PATH",
        help="Kind of GPU (seq1f1b gpus lists them), this-machine after seq1f1b calibrate, or the "
        "path of a description.",
        rich_help_panel="Cluster",
    ),
]
GpusPerNode = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node",
        min=1,
        help="GPUs of a node. [default: as the GPU's description says]",
        rich_help_panel="Cluster",
    ),
]


class MegatronCommand(TyperCommand):
    """A command whose help also lists the options of Megatron that it reads."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.params += _help_entries()
        super().format_help(ctx, formatter)


def _help_entries() -> list[Any]:
    """Return the table of options in the form that the help is written from."""

    def listing(**values: Any) -> None:
        """List options."""

    listing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                option.flags[0].removeprefix("--").replace("-", "_"),
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[str | None if option.type else bool, _entry(option)],
            )
            for option in options()
        ]
    )
    app = typer.Typer()
    app.command()(listing)
    command: Any = typer.main.get_command(app)
    return [entry for entry in command.params if entry.name != "help"]


def _entry(option: Option) -> Any:
    default = option.default
    shown = "" if default in (None, False, True) else f" [default: {_words(default)}]"
    return typer.Option(
        option.flags[0],
        help=option.help + shown,
        metavar=_metavar(option),
        show_default=False,
        rich_help_panel=option.panel,
    )


def _metavar(option: Option) -> str | None:
    if option.type is None:
        return None
    if option.choices and not option.many:
        return "|".join(option.choices)
    return {int: "N", float: "X"}.get(option.type, "TEXT") + (" ..." if option.many else "")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_given(arguments: Sequence[str], model: str | None) -> Given:
    """Read the options that a command line gives, on top of the model's; errors end the command."""
    given = or_exit(lambda: read_options(arguments))
    for flag in given.ignored:
        if flag in VISITING:
            raise flag_error(flag, VISITING[flag])
    if model is None:
        return given
    values = or_exit(lambda: model_options(model))
    return Given(values | given.values, given.ignored)


def read_setting(
    given: Given, *, gpus: int | None = None, schedule: ScheduleName | None = None
) -> Setting:
    """Return the setting; errors end the command."""
    return or_exit(lambda: resolve(given.values, num_gpus=gpus, schedule=schedule))


def or_exit[Result](call: Callable[[], Result]) -> Result:
    """Return what ``call`` returns, or end the command with status 2 and every fault."""
    try:
        return call()
    except SettingError as error:
        typer.echo("seq1f1b cannot plan with these settings:", err=True)
        for fault in error.faults:
            typer.echo(f"  - {fault}", err=True)
    except DataFileError as error:
        typer.echo(f"seq1f1b: {error}", err=True)
    raise typer.Exit(2)
