"""Positions of a model beyond those it was made for: RoPE as the recipe scales it."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from seq1f1b.ulysses.training.recipe import Recipe, RecipeError, reported

_log = logging.getLogger(__name__)
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_UNSCALED = ("default", None)
_FULL = "full_attention"


def scale_positions(recipe: Recipe, config: Any) -> None:
    """Set RoPE for ``max_position_embeddings``, or refuse rows that are too long for the model.

    Raises RecipeError.
    """
    text = config.get_text_config()
    name = next((n for n in _POSITIONS if isinstance(getattr(text, n, None), int)), None)
    own = getattr(text, name) if name else None
    wanted, rope = recipe.max_position_embeddings, recipe.rope
    has_rope = isinstance(getattr(text, "rope_parameters", None), dict)
    if has_rope and recipe.model.config is not None:
        _check_rope(text, "model.config.rope_parameters")
    if (rope or (wanted and own and wanted > own)) and not has_rope:
        key = "rope" if rope else "max_position_embeddings"
        raise RecipeError(
            f"{key}: {config.model_type} has no RoPE to scale"
            + (f"; it knows {own} positions" if own else "")
        )
    if rope:
        text.rope_parameters = _changed(text.rope_parameters, rope, "rope")
        text.standardize_rope_params()
        _check_rope(text, "rope")
        _log.info("RoPE as the recipe says: %s", text.rope_parameters)
    elif wanted and own and wanted > own:
        factor = float(math.ceil(wanted / own))
        linear = {"rope_type": "linear", "factor": factor}
        kind = _of_full_attention(text.rope_parameters).get("rope_type")
        if kind not in _UNSCALED:
            raise RecipeError(
                f"max_position_embeddings: the model knows {own} positions by RoPE of type {kind}, "
                f"which linear scaling would replace; say how to reach {wanted} under rope"
            )
        text.rope_parameters = _changed(text.rope_parameters, linear, "max_position_embeddings")
        _log.info("RoPE is scaled linearly by %g: %d positions instead of %d", factor, wanted, own)
    if wanted and name and own and wanted > own:
        setattr(text, name, wanted)
        own = wanted
    if own and recipe.data.max_length > own:
        raise RecipeError(
            f"data.max_length: rows of {recipe.data.max_length} tokens, but the model knows {own} "
            f"positions; set max_position_embeddings to {recipe.data.max_length}"
        )


def _is_by_layer(parameters: Mapping[str, Any]) -> bool:
    """Whether RoPE has parameters for each type of layer."""
    return any(isinstance(value, dict) for value in parameters.values())


def _of_full_attention(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of layers that attend to all positions."""
    return parameters.get(_FULL, {}) if _is_by_layer(parameters) else parameters


def _changed(parameters: Mapping[str, Any], change: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return RoPE's parameters with ``change``.

    Where types of layers have parameters of their own, a change that names none is one of the
    layers that attend to all positions: those with a window see no larger distances than before.
    """
    if not _is_by_layer(parameters):
        return {**parameters, **change}
    if not _is_by_layer(change):
        change = {_FULL: change}
    unknown = [name for name in change if name not in parameters]
    if unknown:
        raise RecipeError(
            f"{key}: this model has RoPE for {' and '.join(parameters)}, not for {unknown[0]}"
        )
    return {name: {**own, **change.get(name, {})} for name, own in parameters.items()}


def _check_rope(text: Any, key: str) -> None:
    """Refuse a type of RoPE that does not exist, or one that lacks what it needs."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = text.rope_parameters
    kinds = {"default", *ROPE_INIT_FUNCTIONS}
    for each in (parameters, *parameters.values()):
        kind = each.get("rope_type", "default") if isinstance(each, dict) else "default"
        if kind not in kinds:
            raise RecipeError(f"{key}.rope_type: {kind!r} is none of {', '.join(sorted(kinds))}")
    with reported(key):
        text.validate_rope()
