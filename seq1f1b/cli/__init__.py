"""``seq1f1b``: see and compare schedules before they cost anything, and train on long sequences."""

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from seq1f1b.cli.calibrate import calibrate
from seq1f1b.cli.compare import compare
from seq1f1b.cli.listing import list_gpus, models
from seq1f1b.cli.map_gpus import map_gpus
from seq1f1b.cli.megatron import CONTEXT, MegatronCommand
from seq1f1b.cli.memory import memory
from seq1f1b.cli.plan import plan
from seq1f1b.cli.plan_offload import plan_offload
from seq1f1b.cli.simulate import simulate
from seq1f1b.cli.timeline import timeline
from seq1f1b.cli.training import copy_cfg, list_cfg, train
from seq1f1b.cli.ulysses import app as ulysses
from seq1f1b.errors import Seq1F1BError


class _Commands(TyperGroup):
    """Reports what Seq1F1B raises on purpose by its message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """See TyperGroup."""
        try:
            return super().invoke(ctx)
        except Seq1F1BError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Plan pipeline schedules and training settings, and train Hugging Face models on long "
    "sequences.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"seq1f1b {version('seq1f1b')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options before the name of a command."""


app.command(cls=MegatronCommand, context_settings=CONTEXT)(plan)
app.command(cls=MegatronCommand, context_settings=CONTEXT)(memory)
app.command("plan-offload", cls=MegatronCommand, context_settings=CONTEXT)(plan_offload)
app.command(cls=MegatronCommand, context_settings=CONTEXT)(simulate)
app.command(cls=MegatronCommand, context_settings=CONTEXT)(compare)
app.command(cls=MegatronCommand, context_settings=CONTEXT)(timeline)
app.command()(calibrate)
app.command()(models)
app.command("gpus")(list_gpus)
app.command("map-gpus")(map_gpus)
app.command("list-cfg")(list_cfg)
app.command("copy-cfg")(copy_cfg)
app.command()(train)
app.add_typer(ulysses, name="ulysses")

__all__ = ["app"]
