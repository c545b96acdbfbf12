"""Recipes: what a training run is, as YAML with typed keys. Unknown keys are refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from seq1f1b.errors import Seq1F1BError, did_you_mean


class RecipeError(Seq1F1BError, ValueError):
    """A recipe, or a flag that changes it, says something impossible; lists all of it."""


@contextmanager
def reported(key: str) -> Iterator[None]:
    """Report whatever transformers raises of a configuration as a fault of ``key``."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # of its validators, torch's, or a KeyError of one of its tables
        cause = error.__cause__ or error
        lines = str(cause.args[0]).strip().splitlines() if cause.args else []
        text = lines[0] if lines else repr(cause)
        if isinstance(cause, KeyError) and " " not in text:
            text = f"transformers has nothing named {text!r}"
        raise RecipeError(f"{key}: {text}") from error


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(_Section):
    """Which model."""

    name: str | None = Field(
        None, description="A folder or a name on the hub with weights to start from."
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Instead of name: model_type and any settings of its configuration; the "
        "weights are drawn at random.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="What layers compute in. Weights, gradients and optimizer are float32.",
    )
    attention_core: str | None = Field(
        None, description="The attention core to take everywhere. [default: the fastest that fits]"
    )
    verify: bool = Field(
        False, description="First compare a small copy on one process with one on the group."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "ModelSettings":
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name (weights to start from) or config (random weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, such as llama")
        return self


class DataSettings(_Section):
    """What it is trained on."""

    source: str | list[str] = Field(
        description="Files (.jsonl, .parquet), folders of such, or a data set on the hub; "
        "python-library is the source code of Python's own library."
    )
    split: str = Field("train", description="The split of a data set on the hub.")
    format: Literal["auto", "text", "messages", "prompt"] = Field(
        "auto", description="What a record holds. [auto: by its keys]"
    )
    text_key: str = Field("text", description="The key of a text to learn whole.")
    messages_key: str = Field(
        "messages", description="The key of a conversation; what the assistant says is learned."
    )
    prompt_key: str = Field("prompt", description="The key of a prompt, which is not learned.")
    answer_key: str = Field("answer", description="The key of the answer to it, which is learned.")
    tokenizer: str | None = Field(
        None, description="A folder, a name on the hub, or bytes. [default: the model's own]"
    )
    max_length: int = Field(ge=2, description="Tokens of a row.")
    packing: Literal["whole", "cut", "none"] = Field(
        "whole",
        description="whole: documents share rows and stay in one piece where they fit; cut: rows "
        "are filled and documents cut where one ends; none: a document a row.",
    )
    too_long: Literal["cut", "drop"] = Field(
        "cut", description="What becomes of documents that are longer than a row."
    )


_Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainingSettings(_Section):
    """How long, how much at a time, and the optimizer (AdamW)."""

    steps: PositiveInt | None = Field(None, description="Steps of the optimizer.")
    epochs: PositiveFloat | None = Field(
        None, description="Instead of steps: passes over the rows."
    )
    global_batch_size: PositiveInt = Field(
        1, description="Rows of a step, whatever the number of GPUs."
    )
    micro_batch_size: PositiveInt = Field(1, description="Rows that a group computes at a time.")
    learning_rate: PositiveFloat = Field(1e-5, description="The highest learning rate.")
    min_learning_rate: float = Field(0.0, ge=0, description="The learning rate at the end.")
    warmup_steps: int = Field(0, ge=0, description="Steps in which the learning rate rises from 0.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate falls after that."
    )
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW; not on vectors.")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.95), description="Of AdamW.")
    eps: PositiveFloat = Field(1e-8, description="Of AdamW.")
    max_grad_norm: PositiveFloat | None = Field(
        1.0, description="Gradients are scaled down to this norm; null turns it off."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "TrainingSettings":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

    @model_validator(mode="after")
    def _falls(self) -> "TrainingSettings":
        if self.schedule != "constant" and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate "
                f"{self.learning_rate:g}"
            )
        return self


class MemorySettings(_Section):
    """What saves memory at the cost of time; nothing here changes a value."""

    recompute: Literal["none", "layers", "offload"] = Field(
        "layers",
        description="layers: keep a layer's input and compute it again in the backward pass; "
        "offload: keep that input in host memory.",
    )
    loss_tile: PositiveInt | None = Field(
        1024, description="Tokens whose logits are alive at a time; null computes all at once."
    )
    mlp_tile: PositiveInt | None = Field(None, description="Tokens that an MLP computes at a time.")
    unit_at_a_time: bool = Field(
        False, description="Exchange and compute attention one unit of work at a time."
    )
    subsequences: PositiveInt = Field(
        1, description="Parts of a row that are computed one after the other, with a KV carry."
    )
    cpu_offload: bool = Field(
        False, description="Keep weights, gradients and optimizer in host memory."
    )


class CheckpointSettings(_Section):
    """What is saved."""

    every: PositiveInt | None = Field(
        None, description="Steps between checkpoints. [default: one at the end]"
    )
    keep: PositiveInt = Field(2, description="Checkpoints that are kept, the latest ones.")
    export: bool = Field(True, description="At the end, write the model as transformers reads it.")


class Recipe(_Section):
    """A training run."""

    sequence_parallel_size: PositiveInt = Field(1, description="Ranks that share a row.")
    max_position_embeddings: PositiveInt | None = Field(
        None,
        description="Positions that the model shall know. Beyond its own, RoPE is scaled linearly "
        "by ceil(new / own), or as rope says.",
    )
    rope: dict[str, Any] | None = Field(
        None,
        description="rope_parameters of the model's configuration, such as rope_type: yarn. Of a "
        "model with RoPE by type of layer, those of full_attention, or of each type that is named.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of data order, dropout and random weights.")
    log_every: PositiveInt = Field(1, description="Steps between lines of metrics.jsonl.")
    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    memory: MemorySettings = MemorySettings()
    checkpoints: CheckpointSettings = CheckpointSettings()


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; raises RecipeError that names the file and every key at fault."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: no YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {type(content).__name__}")
    return check_recipe(content, str(path))


def check_recipe(content: dict[str, Any], name: str) -> Recipe:
    """Return the recipe that ``content`` describes; raises RecipeError."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [f"{name}: {_sentence(dict(fault))}" for fault in error.errors()]
        raise RecipeError("\n".join(lines)) from None


def _sentence(fault: dict[str, Any]) -> str:
    key = ".".join(map(str, fault["loc"])) or "recipe"
    if fault["type"] == "extra_forbidden":
        known = _keys_beside(fault["loc"])
        hint = did_you_mean(str(fault["loc"][-1]), known) or f"; known here: {', '.join(known)}"
        return f"{key}: no such key{hint}"
    if fault["type"] == "missing":
        return f"{key}: missing, and there is no default"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {message}, not {fault['input']!r}"


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def documented_keys() -> list[tuple[str, str, str]]:
    """Return every key of a recipe with its default and its description."""
    rows: list[tuple[str, str, str]] = []

    def add(section: Any, prefix: str) -> None:
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, _Section):
                add(kind, f"{prefix}{name}.")
            else:
                default = "required" if field.is_required() else yaml_text(field.default)
                rows.append((prefix + name, default, field.description or ""))

    add(Recipe, "")
    return rows


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a recipe, such as ``training.steps``, with its value."""
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def yaml_text(value: Any) -> str:
    """Return a value as YAML writes it in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()
