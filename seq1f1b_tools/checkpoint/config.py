"""A model's config.json as transformers reads it, with each setting typed."""

import json
import math
from pathlib import Path
from typing import Any

from seq1f1b_tools.checkpoint.problem import ConversionError, one_line

_MOST = 2**31 - 1
_NEVER_NULL = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)
_QUANTIZED = ("quantization_config", "compression_config")


class Config:
    """The settings of one model; what config.json leaves out has the default of its family."""

    def __init__(self, file: Path, settings: Any) -> None:
        self.file = file
        self._settings = settings

    @property
    def family(self) -> str:
        """The model_type."""
        return str(self._settings.model_type)

    def get(self, name: str) -> Any:
        """Return a setting as it is; None where the family does not have it."""
        return getattr(self._settings, name, None)

    def whole(self, name: str, *, least: int = 1, most: int = _MOST) -> int:
        """Return a whole number from ``least`` to ``most``."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refusal(name, f"must be a whole number from {least} to {most}")
        return value

    def optional_whole(self, name: str) -> int | None:
        """Return a whole number from 1 up, or None."""
        return None if self.get(name) is None else self.whole(name)

    def number(self, name: str) -> float:
        """Return a number above 0."""
        return positive(self.get(name), self.file, name)

    def switch(self, name: str) -> bool:
        """Return a setting that is on or off; one that is null or not there is off."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return bool(value)

    def require(self, name: str, *allowed: Any) -> None:
        """Raise ConversionError where a setting has a value that has no counterpart."""
        if self.get(name) not in allowed:
            raise self.refusal(name, "is not converted")

    def refusal(self, name: str, reason: str) -> ConversionError:
        """Return an error about one setting."""
        return ConversionError(f"{self.file}: {name} = {self.get(name)!r:.80} {reason}")


def positive(value: Any, file: Path, name: str) -> float:
    """Return ``value`` as a number above 0; raises ConversionError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConversionError(f"{file}: {name} = {value!r:.80} must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ConversionError(f"{file}: {name} = {value!r:.80} must be above 0 and finite")
    return number


def read_config(folder: Path, families: tuple[str, ...]) -> Config:
    """Read ``folder/config.json`` of a model of one of the ``families``.

    Raises:
        ConversionError: the file is missing or damaged, or has settings that transformers refuses.
    """
    file = folder / "config.json"
    stored = read_json(file, missing=f"{folder} has no config.json: give a Hugging Face model")
    family = stored.get("model_type")
    if family not in families:
        raise ConversionError(
            f"{file}: model_type {family!r:.80} is not converted; {', '.join(families)} are"
        )
    null = [key for key in _NEVER_NULL if key in stored and stored[key] is None]
    if null:
        raise ConversionError(f"{file}: no {', '.join(null)}")
    for key in _QUANTIZED:
        if stored.get(key) is not None:
            raise ConversionError(
                f"{file}: the weights are quantized ({key}); convert the model they were made "
                "from, or store them dequantized"
            )
    if stored.get("transformers_weights") is not None:
        raise ConversionError(
            f"{file}: transformers_weights names another file; rename that to model.safetensors"
        )
    from transformers import AutoConfig, logging

    logging.set_verbosity_error()
    try:
        settings = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # its validators raise classes of many kinds
        raise ConversionError(f"{file}: {one_line(error)}") from None
    return Config(file, settings)


def read_json(file: Path, *, missing: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConversionError: ``missing`` where there is no such file, else what is wrong, and where.
    """
    try:
        stored = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConversionError(missing) from None
    except json.JSONDecodeError as error:
        raise ConversionError(f"{file}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{file}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise ConversionError(f"{file}: not usable JSON: {one_line(error)}") from None
    if not isinstance(stored, dict):
        raise ConversionError(f"{file} holds a JSON {type(stored).__name__}, not an object")
    return stored
