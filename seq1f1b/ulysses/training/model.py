"""The model of a run: its configuration, position scaling, and weights."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seq1f1b.ulysses.training.recipe import Recipe, RecipeError

_log = logging.getLogger(__name__)
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_UNSCALED = ("default", None)


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
        try:
            config = AutoConfig.for_model(model_type, **given)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"model.config: {error}") from None
    elif name is not None:
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.name: no model {name}: {error}") from None
    config.use_cache = False
    _scale_positions(recipe, config)
    return config


def _scale_positions(recipe: Recipe, config: Any) -> None:
    """Set RoPE for ``max_position_embeddings``, or refuse rows that are too long for the model."""
    text = config.get_text_config()
    name = next((n for n in _POSITIONS if isinstance(getattr(text, n, None), int)), None)
    own = getattr(text, name) if name else None
    wanted, rope = recipe.max_position_embeddings, recipe.rope
    has_rope = isinstance(getattr(text, "rope_parameters", None), dict)
    if (rope or (wanted and own and wanted > own)) and not has_rope:
        key = "rope" if rope else "max_position_embeddings"
        raise RecipeError(
            f"{key}: {config.model_type} has no RoPE to scale"
            + (f"; it knows {own} positions" if own else "")
        )
    if rope:
        text.rope_parameters = {**text.rope_parameters, **rope}
        _log.info("RoPE as the recipe says: %s", text.rope_parameters)
    elif wanted and own and wanted > own:
        kind = text.rope_parameters.get("rope_type")
        if kind not in _UNSCALED:
            raise RecipeError(
                f"max_position_embeddings: the model knows {own} positions by RoPE of type {kind}, "
                f"which linear scaling would replace; say how to reach {wanted} under rope"
            )
        factor = float(math.ceil(wanted / own))
        text.rope_parameters = {**text.rope_parameters, "rope_type": "linear", "factor": factor}
        _log.info("RoPE is scaled linearly by %g: %d positions instead of %d", factor, wanted, own)
    if wanted and name and own and wanted > own:
        setattr(text, name, wanted)
        own = wanted
    if own and recipe.data.max_length > own:
        raise RecipeError(
            f"data.max_length: rows of {recipe.data.max_length} tokens, but the model knows {own} "
            f"positions; set max_position_embeddings to {recipe.data.max_length}"
        )


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
    if is_first:
        return AutoModelForCausalLM.from_config(config, **options)
    with parameters_on_meta():
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
