"""Typed description files: YAML in the package, or a file of the user's."""

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from seq1f1b.planner.errors import DataFileError


class Described(BaseModel):
    """A file that says what it describes and where its figures come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    source: str


class Figure(BaseModel):
    """A number with its origin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    kind: Literal["measured", "datasheet", "assumed"]
    source: str


def load[Kind: BaseModel](kind: type[Kind], folder: str, name: str) -> Kind:
    """Read the file ``name`` of a folder of the package, or the file at the path ``name``.

    Raises DataFileError when there is none, or a field does not fit.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise DataFileError(f"{name}: cannot be read: {error.strerror}") from None
    else:
        resource = files("seq1f1b.planner").joinpath(f"data/{folder}/{name}.yaml")
        if not resource.is_file():
            raise DataFileError(
                f"{name}: there is no such description; choose one of "
                f"{', '.join(available(folder))}, or give the path of a .yaml file"
            )
        text = resource.read_text("utf-8")
    return parse(kind, text, name)


def parse[Kind: BaseModel](kind: type[Kind], text: str, name: str) -> Kind:
    """Read a description from YAML; raises DataFileError that names the file and the field."""
    try:
        values: Any = yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise DataFileError(f"{name}: no YAML: {error}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataFileError(f"{name}: {where}: {first['msg']}") from None


def available(folder: str) -> list[str]:
    """Return the names of the package's files in a folder."""
    entries = files("seq1f1b.planner").joinpath(f"data/{folder}").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries)


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
