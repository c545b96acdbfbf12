"""Memory of a training step on one GPU, term by term, before it runs; and what would make it fit.

Counts what ``seq1f1b train`` keeps: float32 weights, gradients and AdamW moments divided over all
GPUs (ZeRO-3 as in arXiv 1910.02054, by FSDP2), activations divided over the ranks that share rows.
It is an account of tensors, not of the allocator's fragments or of libraries' own buffers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from seq1f1b.ulysses.check.source import Source
from seq1f1b.ulysses.training.recipe import MemorySettings
from seq1f1b.ulysses.training.sharding import layers_of

_FLOAT32 = 4
_STATES = 4 * _FLOAT32
"""Bytes of a parameter: weight, gradient, and two moments."""
_GRADIENTS, _MLP = "gradients of these", "MLP"


@dataclass(frozen=True)
class Shape:
    """What the account needs of a model. Parameters are counted, widths are elements of a token.

    layer_parameters: of the largest layer. mlp: intermediate width that a token goes through, times
    the tensors of that width that a backward pass needs.
    """

    parameters: int
    layer_parameters: int
    other_parameters: int
    num_layers: int
    hidden: int
    vocabulary: int
    heads: int
    key_heads: int
    key_width: int
    value_width: int
    mlp: int

    @classmethod
    def read(cls, source: Source) -> "Shape":
        """Build the model without storage and measure it; raises ValueError if there is none."""
        from transformers import AutoModelForCausalLM

        config = source.config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.remote_code)
        text = config.get_text_config()
        layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
        if not layers:
            raise ValueError(f"{type(model).__name__} does not say which modules are its layers")
        total = sum(p.numel() for p in model.parameters())
        heads = _first(text, "num_attention_heads", "n_head")
        hidden = _first(text, "hidden_size", "n_embd")
        width = _known(text, "head_dim") or hidden // heads
        key, value = width, width
        key_heads = _known(text, "num_key_value_heads") or heads
        if _known(text, "kv_lora_rank"):  # MLA: what is gathered is expanded
            key = text.qk_nope_head_dim + text.qk_rope_head_dim
            value, key_heads = text.v_head_dim, heads
        return cls(
            parameters=total,
            layer_parameters=max(layers),
            other_parameters=total - sum(layers),
            num_layers=len(layers),
            hidden=hidden,
            vocabulary=text.vocab_size,
            heads=heads,
            key_heads=key_heads,
            key_width=key,
            value_width=value,
            mlp=_mlp_elements(text, hidden),
        )


def _known(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _first(config: Any, *names: str) -> int:
    for name in names:
        if found := _known(config, name):
            return found
    raise ValueError(f"the configuration of {config.model_type} has no {' or '.join(names)}")


def _mlp_elements(config: Any, hidden: int) -> int:
    """Return gate, its activation, up and product of a token, over all experts that it goes to."""
    dense = next(
        (w for n in ("intermediate_size", "ffn_dim", "n_inner") if (w := _known(config, n))),
        4 * hidden,
    )
    chosen = _known(config, "num_experts_per_tok")
    if not chosen:
        return 4 * dense
    expert = _known(config, "moe_intermediate_size") or dense
    shared = _known(config, "shared_expert_intermediate_size")
    shared += _known(config, "n_shared_experts") * expert
    return 4 * max(
        chosen * expert + shared, dense if _known(config, "first_k_dense_replace") else 0
    )


@dataclass(frozen=True)
class Load:
    """tokens: of a row. rows: of a group at a time. itemsize: bytes that layers compute in."""

    tokens: int
    gpus: int
    size: int
    rows: int = 1
    itemsize: int = 2


@dataclass(frozen=True)
class Term:
    """nbytes on one GPU. phase: always, layer or loss; of the last two only the larger counts."""

    name: str
    nbytes: float
    phase: str = "always"


def account(shape: Shape, load: Load, memory: MemorySettings) -> list[Term]:
    """Return what one GPU holds at the peak of a step."""
    e = load.itemsize
    shard = math.ceil(load.tokens / load.size) * load.rows
    part = math.ceil(shard / memory.subsequences)
    states = _STATES * shape.parameters / load.gpus
    divided = 0.0 if memory.cpu_offload else states
    gathered = (2 * shape.layer_parameters + shape.other_parameters) * e
    gradients = shape.layer_parameters * (e + _FLOAT32) + shape.other_parameters * e
    terms = [
        Term("weights, gradients and AdamW moments, divided", divided),
        Term("weights of two layers, embeddings and head, gathered", gathered),
        Term("gradients of a layer, embeddings and head, before they are divided", gradients),
    ]
    layer = list(_layer(shape, load, memory, shard, part))
    if memory.recompute == "none":
        passing = {_GRADIENTS, _MLP} if memory.mlp_tile else {_GRADIENTS}
        kept = sum(term.nbytes for term in layer if term.name not in passing)
        kept *= shape.num_layers - 1
        terms.append(Term("activations of the other layers", kept))
    else:
        inputs = 2 if memory.recompute == "offload" else shape.num_layers
        name = "inputs of two layers on the way" if inputs == 2 else "inputs of layers"
        terms.append(Term(name, min(inputs, shape.num_layers) * part * shape.hidden * e))
    if memory.subsequences > 1:
        width = shape.key_heads * (shape.key_width + shape.value_width)
        carry = 2 * shape.num_layers * shard * width * e
        terms.append(Term("keys, values and their gradients, carried", carry))
    tile = min(part, (memory.loss_tile or part) * load.rows)
    # logits and their gradient as computed; float32: logits, logarithm of softmax, gradient
    logits = tile * shape.vocabulary * (2 * e + 3 * _FLOAT32)
    return [*terms, *layer, Term("logits", logits, "loss")]


def _layer(
    shape: Shape, load: Load, memory: MemorySettings, shard: int, part: int
) -> Iterator[Term]:
    """Yield what the layer needs whose backward pass runs."""
    e = load.itemsize
    queries = shape.heads * (shape.key_width + shape.value_width)
    keys = shape.key_heads * (shape.key_width + shape.value_width)
    # two norms keep their input in float32 and their output; queries and keys before and after RoPE
    norms = 2 * shape.hidden * (_FLOAT32 + e)
    yield Term(
        "norms, queries, keys, values and output",
        part * (norms + 2 * (queries + keys) * e),
        "layer",
    )
    whole, sharers = load.tokens * load.rows, load.size
    own_heads, own_keys = shape.heads / sharers, _keys_of_a_rank(shape, sharers)
    if memory.unit_at_a_time:
        own_keys = min(own_keys, 1)
        own_heads = min(own_heads, shape.heads / shape.key_heads)
    each = shape.key_width + shape.value_width
    gathered = whole * each * (own_heads / memory.subsequences + own_keys) * e
    if load.size == 1:
        gathered = 0.0
    yield Term("queries, keys, values and output, gathered", gathered, "layer")
    yield Term(_GRADIENTS, gathered or part * (queries + keys) * e, "layer")
    tokens = min(part, (memory.mlp_tile or part) * load.rows)
    yield Term(_MLP, tokens * shape.mlp * e, "layer")


def _keys_of_a_rank(shape: Shape, size: int) -> int:
    """Return how many heads of keys a rank gathers at most."""
    if shape.key_heads % size == 0:
        return shape.key_heads // size
    group = shape.heads // shape.key_heads
    if shape.heads % size == 0 and group % (shape.heads // size) == 0:
        return 1
    return min(shape.key_heads, math.ceil(shape.heads / size / group) + 1)


def peak(terms: list[Term]) -> float:
    """Return the bytes that are alive at once."""
    phases = {"always": 0.0, "layer": 0.0, "loss": 0.0}
    for term in terms:
        phases[term.phase] += term.nbytes
    return phases["always"] + max(phases["layer"], phases["loss"])


_SWITCHES: tuple[dict[str, Any], ...] = (
    {"loss_tile": 1024},
    {"recompute": "layers"},
    {"mlp_tile": 4096},
    {"unit_at_a_time": True},
    {"recompute": "offload"},
    {"cpu_offload": True},
    {"subsequences": 4},
    {"subsequences": 16},
)
"""What costs little time first."""


def advise(shape: Shape, load: Load, memory: MemorySettings, limit: float) -> dict[str, Any] | None:
    """Return settings of ``memory`` to change so that a step fits in ``limit`` bytes.

    Empty when it fits as it is; None when no settings are enough. Settings that are not needed are
    left as they are.
    """
    chosen: dict[str, Any] = {}

    def fits(changes: dict[str, Any]) -> bool:
        return peak(account(shape, load, memory.model_copy(update=changes))) <= limit

    for switch in _SWITCHES:
        if fits(chosen):
            break
        if not _already(memory, switch):
            chosen |= switch
    if not fits(chosen):
        return None
    for name in list(chosen):
        fewer = {key: value for key, value in chosen.items() if key != name}
        if fits(fewer):
            chosen = fewer
    return chosen


def _already(memory: MemorySettings, switch: dict[str, Any]) -> bool:
    """Whether the setting saves as much as the switch, or more."""
    ((name, value),) = switch.items()
    own = getattr(memory, name)
    if name == "recompute":
        order = ("none", "layers", "offload")
        return order.index(own) >= order.index(value)
    if name.endswith("tile"):
        return own is not None and own <= value
    return bool(own >= value)


def host_bytes(shape: Shape, load: Load, memory: MemorySettings) -> float:
    """Return what one GPU's process keeps in host memory."""
    total = 0.0
    if memory.cpu_offload:
        total += _STATES * shape.parameters / load.gpus
    if memory.recompute == "offload":
        shard = math.ceil(load.tokens / load.size) * load.rows / memory.subsequences
        total += shape.num_layers * shard * shape.hidden * load.itemsize
    return total
