"""Models by name: description files in data/models, or a Hugging Face config.json."""

import json
from pathlib import Path
from typing import Any

from seq1f1b.planner.arguments import options
from seq1f1b.planner.errors import DataFileError
from seq1f1b.planner.files import Described, available, load
from seq1f1b.planner.huggingface import options_of_config


class Preset(Described):
    """A model in Megatron's options, named as on the command line without the dashes in front."""

    options: dict[str, int | float | bool | str]


def model_options(name: str) -> dict[str, Any]:
    """Return fields of ``Arguments`` for a model.

    ``name`` is a preset's, or the path of a Hugging Face config.json or of the folder that it is
    in. Raises DataFileError where there is no such model, or one of another family.
    """
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json":
        return options_of_config(_read_json(path), str(path))
    by_flag = {option.flags[0].removeprefix("--"): option for option in options()}
    values: dict[str, Any] = {}
    for flag, value in load(Preset, "models", name).options.items():
        option = by_flag.get(flag)
        if option is None:
            raise DataFileError(f"{name}: options.{flag}: there is no such option")
        # a flag without a value turns its field around
        values[option.name] = not option.default if option.type is None else option.type(value)
    return values


def presets() -> list[str]:
    """Return the names of all models that the package describes."""
    return available("models")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataFileError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(config, dict):
        raise DataFileError(f"{path}: not a model's configuration")
    return config
