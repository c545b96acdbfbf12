"""What fine_tune.yaml says, checked."""

from pathlib import Path
from typing import Annotated, Any, Self

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
from transformers import AutoConfig

TINY = "tiny"


class SettingsError(ValueError):
    """The settings cannot be trained with; the message names file and field."""


class Settings(BaseModel):
    """Every field of fine_tune.yaml. Paths are relative to its folder."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    dataset: str
    cuda_visible_devices: Annotated[str, Field(pattern=r"^\d+(,\d+)*$")]
    num_stages: PositiveInt
    batch_size: PositiveInt
    num_chunks: PositiveInt
    num_iterations: PositiveInt
    seq_length: PositiveInt
    num_layers: PositiveInt
    embedding_dim: PositiveInt
    ff_dim: PositiveInt
    num_heads: PositiveInt
    use_offload: bool
    use_prefetch: bool
    save_results: bool
    save_dir: str
    master_port: Annotated[int, Field(ge=1, le=65535)]
    learning_rate: PositiveFloat = 1e-5
    save_megatron: bool = False

    @property
    def num_gpus(self) -> int:
        """Pipeline stages, a GPU or process each."""
        return len(self.cuda_visible_devices.split(","))

    @property
    def num_virtual(self) -> int:
        """Model chunks of a GPU."""
        return self.num_stages // self.num_gpus

    @model_validator(mode="after")
    def _fits(self) -> Self:
        devices = self.cuda_visible_devices.split(",")
        if len(set(devices)) < len(devices):
            raise ValueError(f"cuda_visible_devices {self.cuda_visible_devices}: one comes twice")
        if len(devices) < 2:
            raise ValueError("cuda_visible_devices: a pipeline needs 2 or more")
        for name, value, by, divisor in (
            ("num_stages", self.num_stages, "the number of GPUs", len(devices)),
            ("num_layers", self.num_layers, "num_stages", self.num_stages),
            ("batch_size", self.batch_size, "num_chunks (micro-batches)", self.num_chunks),
        ):
            if value % divisor:
                raise ValueError(f"{name} {value}: must be a multiple of {by}, {divisor}")
        if self.use_offload and self.num_virtual < 2:
            raise ValueError(
                f"use_offload: needs 2 or more virtual stages a GPU: num_stages of at least "
                f"{2 * len(devices)}"
            )
        if self.use_prefetch and not self.use_offload:
            raise ValueError("use_prefetch: goes with use_offload only")
        return self


def read_settings(file: Path) -> Settings:
    """Read and check a file. Raises SettingsError that lists every fault."""
    try:
        content = yaml.safe_load(file.read_text())
        return Settings.model_validate(content)
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{file}: {error}") from None
    except ValidationError as error:
        faults = [
            f"{file}: {'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise SettingsError("\n".join(faults)) from None


def check_model(settings: Settings, folder: str) -> Any:
    """Return the model's config, which the settings must agree with. Raises SettingsError."""
    config = AutoConfig.from_pretrained(folder)
    for name, given, right in (
        ("embedding_dim", settings.embedding_dim, config.hidden_size),
        ("ff_dim", settings.ff_dim, config.intermediate_size),
        ("num_heads", settings.num_heads, config.num_attention_heads),
    ):
        if given != right:
            raise SettingsError(f"{name} {given}: config.json of {settings.model} has {right}")
    if settings.num_layers > config.num_hidden_layers:
        raise SettingsError(
            f"num_layers {settings.num_layers}: {settings.model} has {config.num_hidden_layers}"
        )
    return config
