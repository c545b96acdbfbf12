"""The door through transformers' attention interface, and the lazy masks that go with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seq1f1b.ulysses.attention import Scoring, group_attention
from seq1f1b.ulysses.errors import UnsupportedModelError
from seq1f1b.ulysses.mends.temperature import scale_queries
from seq1f1b.ulysses.rows import Pattern
from seq1f1b.ulysses.run import Run, require_run

NAME = "seq1f1b_ulysses"


@dataclass(frozen=True)
class LazyMask:
    """What a layer may see, and the forward pass it belongs to; takes the place of a mask tensor.

    It travels through the model to the attention function, also when a layer is recomputed.
    """

    pattern: Pattern
    run: Run


def register() -> None:
    """Make the attention and mask functions known to transformers, both under ``NAME``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, interface_attention)
    AttentionMaskInterface.register(NAME, make_mask)


def make_mask(*args: Any, mask_function: Callable[..., Any], **kwargs: Any) -> LazyMask:
    """Return the mask that transformers asks for, as a pattern over the group's rows."""
    return LazyMask(read_pattern(mask_function), require_run("a mask for attention"))


def read_pattern(mask_function: Callable[..., Any]) -> Pattern:
    """Return which pattern a function of transformers' ``masking_utils`` stands for.

    Raises UnsupportedModelError for any that is not causal, with or without a window or chunks.
    """
    from transformers import masking_utils

    if mask_function is masking_utils.causal_mask_function:
        return Pattern()
    captured = _captured(mask_function)
    match getattr(mask_function, "__qualname__", ""):
        case "and_masks.<locals>.and_mask":
            functions = captured["mask_functions"]
            if masking_utils.causal_mask_function in functions:
                parts = [read_pattern(f) for f in functions]
                windows = [p.window for p in parts if p.window is not None]
                chunks = [p.chunk for p in parts if p.chunk is not None]
                if len(windows) <= 1 and len(chunks) <= 1:
                    return Pattern(windows[0] if windows else None, chunks[0] if chunks else None)
        case "sliding_window_overlay.<locals>.inner_mask":
            return Pattern(window=int(captured["sliding_window"]))
        case "chunked_overlay.<locals>.inner_mask":
            return Pattern(chunk=int(captured["chunk_size"]))
    raise UnsupportedModelError(
        f"the model asks for a mask that is not causal with at most a window or chunks "
        f"({getattr(mask_function, '__qualname__', mask_function)}): tokens that see later ones, "
        f"images among them, cannot be shared out"
    )


def _captured(function: Callable[..., Any]) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return dict(zip(names, (c.cell_contents for c in function.__closure__ or ()), strict=True))


_WITHOUT_MEANING = frozenset(
    {
        "cache_position",
        "deterministic",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
        "sliding_window",
        "use_cache",
    }
)
"""Keywords of attention functions that change no value, or are checked elsewhere."""


def interface_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of one layer over the group's rows, as transformers calls it.

    query, key and value ``[b, heads, shard, dim]``. Returns ``[b, shard, heads, v dim]``. Raises
    UnsupportedModelError when the layer brings a mask or a bias of its own.
    """
    name = type(module).__name__
    if not isinstance(attention_mask, LazyMask):
        raise UnsupportedModelError(
            f"{name} brings its own attention mask"
            + ("" if attention_mask is None else f" {tuple(getattr(attention_mask, 'shape', ()))}")
            + ": it was made from one shard alone and cannot be used for the whole sequence"
        )
    run, pattern = attention_mask.run, attention_mask.pattern
    _check_keywords(name, kwargs, pattern)
    for tensor, what in ((query, "queries"), (key, "keys")):
        run.check_length(tensor.shape[2], f"{name} ({what})")
    query = scale_queries(module, query, run)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, softcap or None, dropout if module.training else 0.0)
    output = group_attention(run, id(module), query, key, value, pattern, scoring, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _check_keywords(name: str, kwargs: dict[str, Any], pattern: Pattern) -> None:
    unknown = sorted(
        key for key, x in kwargs.items() if x is not None and key not in _WITHOUT_MEANING
    )
    if unknown:
        raise UnsupportedModelError(
            f"{name} calls attention with {', '.join(unknown)}, whose meaning is not known here"
        )
    if kwargs.get("is_causal") is False:
        raise UnsupportedModelError(f"{name} asks for attention that is not causal")
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions asks for weights of every pair of tokens, which are never made"
        )
