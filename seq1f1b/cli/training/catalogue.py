"""``seq1f1b list-cfg`` and ``copy-cfg``: the recipes that come with the package."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from seq1f1b.cli.options import flag_error

Pattern = Annotated[
    str, typer.Option("--pattern", "-p", help="Only names that contain this, in any case.")
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of a recipe.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Path of the copy.")]


def list_cfg(pattern: Pattern = "") -> None:
    """Print the names of all recipes."""
    from seq1f1b.ulysses.training.catalogue import recipe_names

    names = recipe_names(pattern)
    for name in names:
        typer.echo(name)
    if not names:
        typer.echo(f"no recipe has {pattern} in its name", err=True)
        raise typer.Exit(1)


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
