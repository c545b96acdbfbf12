"""The recipes that come with the package."""

from importlib.resources import files
from pathlib import Path

from seq1f1b.ulysses.training.recipe import RecipeError

_FOLDER = Path(str(files(__package__))) / "recipes"


def recipe_names(pattern: str = "") -> list[str]:
    """Return the names of embedded recipes that contain ``pattern``, in any case."""
    names = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    return [name for name in names if pattern.lower() in name.lower()]


def recipe_path(name_or_path: str) -> Path:
    """Return the file of a recipe, by its name or its path.

    Raises RecipeError, with names that are similar, when there is none.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"{path}: no such recipe file")
        return path
    found = _FOLDER / f"{name_or_path}.yaml"
    if found.is_file():
        return found
    near = [name for name in recipe_names() if set(name_or_path.split("_")) & set(name.split("_"))]
    raise RecipeError(
        f"no recipe {name_or_path}; "
        + (f"similar: {', '.join(near)}" if near else "seq1f1b list-cfg prints those there are")
    )
