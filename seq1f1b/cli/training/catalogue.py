"""``seq1f1b list-cfg`` and ``copy-cfg``: the recipes that come with the package."""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from seq1f1b.cli.options import flag_error

Pattern = Annotated[
    str, typer.Option("--pattern", "-p", help="Only names that contain this, in any case.")
]
Keys = Annotated[
    bool, typer.Option("--keys", help="Print every key of a recipe instead, with its default.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of a recipe.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Path of the copy.")]


def list_cfg(pattern: Pattern = "", keys: Keys = False) -> None:
    """Print the names of all recipes, or what a recipe may say."""
    if keys:
        _print_keys(pattern)
        return
    from seq1f1b.ulysses.training.catalogue import recipe_names

    names = recipe_names(pattern)
    for name in names:
        typer.echo(name)
    if not names:
        typer.echo(f"no recipe has {pattern} in its name", err=True)
        raise typer.Exit(1)


def _print_keys(pattern: str) -> None:
    from rich.table import Table

    from seq1f1b.cli import report
    from seq1f1b.ulysses.training.recipe import documented_keys

    rows = [row for row in documented_keys() if pattern.lower() in row[0]]
    if not rows:
        typer.echo(f"no key has {pattern} in its name", err=True)
        raise typer.Exit(1)
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for title in ("default", "meaning"):
        table.add_column(title)
    for row in rows:
        table.add_row(*map(escape, row))
    report.console().print(table)


def copy_cfg(name: Name, folder: Folder) -> None:
    """Copy a recipe, to change it and train by it."""
    from seq1f1b.ulysses.training.catalogue import recipe_path
    from seq1f1b.ulysses.training.recipe import RecipeError

    try:
        source = recipe_path(name)
    except RecipeError as error:
        raise flag_error("NAME", str(error)) from None
    target = folder / f"{source.stem}_copy.yaml"
    if target.exists():
        raise flag_error("FOLDER", f"{target} exists")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    typer.echo(str(target))
