"""``seq1f1b ulysses``: sequence parallelism for Hugging Face models."""

import typer

from seq1f1b.cli.ulysses.check import check

app = typer.Typer(
    no_args_is_help=True,
    help="Sequence parallelism for Hugging Face models: check that a model is exact.",
)
app.command()(check)

__all__ = ["app"]
