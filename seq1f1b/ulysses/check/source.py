"""The small model that a check runs, from what a user names."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seq1f1b.ulysses.randomise import randomise
from seq1f1b.ulysses.shrink import shrink


@dataclass(frozen=True)
class Source:
    """name: a folder, a config.json, a name on the hub, or a model type such as ``llama``.

    remote_code: whether code that comes with the model may be run.
    """

    name: str
    remote_code: bool = False

    def config(self) -> Any:
        """Return the configuration as it is.

        Raises ValueError when there is none of this name.
        """
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if self.name in CONFIG_MAPPING and not Path(self.name).exists():
            return AutoConfig.for_model(self.name)
        try:
            return AutoConfig.from_pretrained(self.name, trust_remote_code=self.remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.name} is no folder with a config.json, no such file, no model type of "
                f"transformers and cannot be fetched from the hub: {error}"
            ) from None

    def build(self) -> nn.Module:
        """Return a small model with all kinds of its layers, the same on every call."""
        from transformers import AutoModelForCausalLM

        config = shrink(self.config())
        config.use_cache = False
        torch.manual_seed(0)
        options: dict[str, Any] = {"trust_remote_code": self.remote_code}
        try:
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="sdpa", **options
            )
        except ValueError:  # of models that know no implementation but their own
            model = AutoModelForCausalLM.from_config(config, **options)
        return randomise(model.float().eval())


def scales_by_length(config: Any) -> bool:
    """Whether RoPE follows the longest position, so that packed documents influence each other."""
    described = f"{getattr(config, 'rope_parameters', '')} {getattr(config, 'rope_scaling', '')}"
    return "dynamic" in described or "longrope" in described
