"""``seq1f1b ulysses check``: one process against a group of ranks, on a small model."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from seq1f1b.cli.options import Json, flag_error
from seq1f1b.cli.ulysses.options import Model, RemoteCode

if TYPE_CHECKING:
    from seq1f1b.ulysses.check import Comparison

_INEXACT, _REFUSED, _ENDED = 1, 2, 3

Sp = Annotated[int, typer.Option("--sp", min=1, help="Ranks that share a sequence.")]
Layouts = Annotated[
    str, typer.Option("--layouts", help="Layouts to check, separated by commas. [default: all]")
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of a batch.")]
Tokens = Annotated[int, typer.Option("--tokens", min=16, help="Tokens of a row.")]


def check(
    model: Model,
    sp: Sp = 2,
    layouts: Layouts = "",
    rows: Rows = 2,
    tokens: Tokens = 48,
    remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prove that a model trains alike on one process and on a group of ranks.

    Shrinks the model's own configuration, keeping every kind of layer, gives it random weights by
    which a fault shows, and compares the loss and every gradient of one process with those of SP
    processes on this machine, in float32. Packed rows are compared with their documents alone.

    Exit status: 0 if all agree, 1 if something differs, 2 if the model is refused,
    3 if a rank ended before it answered.
    """
    from seq1f1b.ulysses.check import LAYOUTS, Source
    from seq1f1b.ulysses.check import check as run_check
    from seq1f1b.ulysses.errors import UnsupportedModelError
    from seq1f1b.ulysses.ranks import RanksError

    chosen = tuple(x.strip() for x in layouts.split(",") if x.strip()) or LAYOUTS
    unknown = [x for x in chosen if x not in LAYOUTS]
    if unknown:
        raise flag_error("--layouts", f"no layout {unknown[0]}; there are {', '.join(LAYOUTS)}")
    try:
        with Console(stderr=True).status(f"comparing one process with {sp} ranks"):
            results = run_check(
                Source(model, remote_code), sp, layouts=chosen, num_rows=rows, length=tokens
            )
    except RanksError as error:
        typer.echo(f"not compared: {error}", err=True)
        raise typer.Exit(_ENDED) from None
    except UnsupportedModelError as error:
        typer.echo(f"refused: {error}", err=True)
        raise typer.Exit(_REFUSED) from None
    except ValueError as error:
        raise flag_error("MODEL_OR_CONFIG", str(error)) from None
    if as_json:
        typer.echo(json.dumps([_figures(result) for result in results], indent=1))
    else:
        _print(results)
    if not all(result.is_exact for result in results):
        raise typer.Exit(_INEXACT)


def _figures(result: "Comparison") -> dict[str, Any]:
    return {
        "layout": result.layout,
        "rows": result.num_rows,
        "ranks": result.size,
        "loss": result.loss,
        "loss_of_one_process": result.wanted_loss,
        "loss_error": result.loss_error,
        "gradient_errors": result.gradients,
        "rounding": {name: x for name, x in result.rounding.items() if name},
        "exact": result.is_exact,
    }


def _print(results: list["Comparison"]) -> None:
    console = Console(highlight=False)
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("relative error of", overflow="fold")
    for result in results:
        table.add_column(result.layout, justify="right")
    table.add_row("loss", *(f"{result.loss_error:.1e}" for result in results))
    for name in results[0].gradients:
        table.add_row(name, *(_cell(result, name) for result in results), style="dim")
    console.print(table)
    for result in results:
        name, error = result.worst
        verdict = "[green]exact[/]" if result.is_exact else "[bold red]DIFFERENT[/]"
        note = ""
        if result.is_exact and not result.is_within_tolerance:
            note = f"; rounding the weights moves it by {result.rounding.get(name, 0.0):.1e}"
        console.print(
            f"{result.layout}: {verdict} on {result.size} ranks; loss {result.loss_error:.1e}, "
            f"worst gradient {error:.1e} ({name}){note}",
            soft_wrap=True,
        )


def _cell(result: "Comparison", name: str) -> str:
    return f"{result.gradients[name]:.1e}"
