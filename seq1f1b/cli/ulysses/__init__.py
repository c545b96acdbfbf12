"""``seq1f1b ulysses``: sequence parallelism for Hugging Face models."""

import typer

from seq1f1b.cli.ulysses.check import check
from seq1f1b.cli.ulysses.plan import plan

app = typer.Typer(
    no_args_is_help=True,
    help="Sequence parallelism for Hugging Face models: is a model exact, and does a step fit?",
)
app.command()(check)
app.command()(plan)

__all__ = ["app"]
