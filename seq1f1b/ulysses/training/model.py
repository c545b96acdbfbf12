"""The model of a run: its configuration, position scaling, and weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seq1f1b.errors import did_you_mean
from seq1f1b.ulysses.training.positions import scale_positions
from seq1f1b.ulysses.training.recipe import Recipe, RecipeError, reported


def make_config(recipe: Recipe, vocabulary: int) -> Any:
    """Return the model's configuration, with positions and RoPE as the recipe says.

    vocabulary: of the tokenizer, which a model with random weights takes over unless the recipe
    gives vocab_size. Raises RecipeError.
    """
    from transformers import AutoConfig

    settings = recipe.model
    name = settings.name
    if settings.config is not None:
        given = dict(settings.config)
        model_type = given.pop("model_type")
        given.setdefault("vocab_size", vocabulary)
        with reported("model.config"):
            config = AutoConfig.for_model(model_type, **given)
            refuse_unknown(given, config)
    elif name is not None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.name: no model {name}: {error}") from None
    config.use_cache = False
    scale_positions(recipe, config)
    return config


def refuse_unknown(given: Mapping[str, Any], config: Any) -> None:
    """Raise RecipeError for keys that transformers keeps, but no model of this type reads."""
    known = vars(type(config)()).keys() | type(config).attribute_map.keys()
    for key in given:
        if key not in known and key in vars(config):
            hint = did_you_mean(key, known)
            raise RecipeError(f"model.config.{key}: {config.model_type} has no such setting{hint}")


def build_model(recipe: Recipe, config: Any, *, on_all: bool) -> nn.Module:
    """Return the model in float32, with weights on rank 0; elsewhere on the meta device.

    on_all: every rank has weights; so it is, too, with code that comes with the model, which may
    have to be tried on them. Buffers are real everywhere. Raises RecipeError.
    """
    from transformers import AutoModelForCausalLM

    settings = recipe.model
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    is_first = on_all or settings.trust_remote_code or dist.get_rank() == 0
    torch.manual_seed(recipe.seed)
    if is_first and settings.name is not None:
        try:
            return AutoModelForCausalLM.from_pretrained(
                settings.name, config=config, dtype=torch.float32, **options
            )
        except OSError as error:
            raise RecipeError(f"model.name: no weights in {settings.name}: {error}") from None
    options |= {"dtype": torch.float32}
    key = "model.name" if settings.config is None else "model.config"
    with reported(key), nullcontext() if is_first else parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, **options)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters that modules register inside on the meta device, and leave buffers real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and not param.is_meta:  # a shared one stays shared
            kept = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = kept

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
