"""Which of Hugging Face's tensors make up which of Megatron's, for every family."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from seq1f1b_tools.checkpoint.families import Experts, Latent, Shape
from seq1f1b_tools.checkpoint.problem import ConversionError


@dataclass(frozen=True)
class Piece:
    """A part of one of Megatron's tensors that is made of Hugging Face's whole tensors.

    Megatron stacks the layers, and in a layer the experts, of one kind of weight: ``key`` has shape
    ``whole``, of which this is what lies at ``offsets``, ``sizes`` long; the first ``num_axes`` of
    these count layers and experts. ``names`` are Hugging Face's, ``shapes`` theirs; a bias that
    only Megatron has is made of none.

    rows: whether the first axis is the vocabulary, which Megatron may pad.
    keeps_type: whether the type stays float32 whatever the other weights are converted to.
    """

    key: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    num_axes: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    rows: bool = False
    keeps_type: bool = False

    @property
    def own_sizes(self) -> tuple[int, ...]:
        """The sizes of this piece in one layer and expert."""
        return self.sizes[self.num_axes :]


def _same(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _halves(tensor: Tensor) -> list[Tensor]:
    return list(tensor.chunk(2))


@dataclass(frozen=True)
class _Weight:
    """``names`` have a place for the {layer} and the {expert} where ``axes`` count them."""

    key: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    join: Callable[[list[Tensor]], Tensor] = _same
    split: Callable[[Tensor], list[Tensor]] = _alone
    experts: int = 0
    rows: bool = False
    keeps_type: bool = False

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        if not self.names:
            return ()
        return tuple(
            tuple(part.shape) for part in self.split(torch.empty(self.shape, device="meta"))
        )


def pieces(shape: Shape, *, transformer_engine: bool = False) -> Iterator[Piece]:
    """Yield all pieces of a model.

    ``transformer_engine`` says whose layers will load the checkpoint: they name some norms
    otherwise.
    """
    for weight in _outside(shape):
        yield from _pieces(weight, weight.key, (), {})
    for layer in range(shape.layers):
        axes = ((shape.layers, layer),) if shape.is_stacked else ()
        prefix = "decoder.layers." if shape.is_stacked else f"decoder.layers.{layer}."
        for weight in _layer(shape, layer, transformer_engine):
            yield from _pieces(weight, prefix + weight.key, axes, {"layer": layer})


def _pieces(
    weight: _Weight, key: str, axes: tuple[tuple[int, int], ...], numbers: dict[str, int]
) -> Iterator[Piece]:
    """Yield the piece of a weight, or one for each expert; ``axes`` are sizes and places."""
    shapes = weight.shapes()
    for expert in range(weight.experts or 1):
        counted = (*axes, (weight.experts, expert)) if weight.experts else axes
        yield Piece(
            key=key,
            whole=(*(size for size, _ in counted), *weight.shape),
            offsets=(*(place for _, place in counted), *(0 for _ in weight.shape)),
            sizes=(*(1 for _ in counted), *weight.shape),
            num_axes=len(counted),
            names=tuple(name.format(**numbers, expert=expert) for name in weight.names),
            shapes=shapes,
            join=weight.join,
            split=weight.split,
            rows=weight.rows,
            keeps_type=weight.keeps_type,
        )


def _outside(shape: Shape) -> Iterator[_Weight]:
    """Yield the weights outside of the layers."""
    vocabulary = (shape.vocabulary, shape.hidden)
    embedding = "embedding.word_embeddings.weight"
    yield _Weight(embedding, ("model.embed_tokens.weight",), vocabulary, rows=True)
    yield _Weight("decoder.final_layernorm.weight", ("model.norm.weight",), (shape.hidden,))
    if not shape.is_tied:
        yield _Weight("output_layer.weight", ("lm_head.weight",), vocabulary, rows=True)


def _layer(shape: Shape, layer: int, transformer_engine: bool) -> Iterator[_Weight]:
    """Yield the weights of one layer."""
    is_sparse = shape.is_sparse(layer)
    before_attention, before_mlp = _norms(shape, is_sparse, transformer_engine)
    yield _linear(before_attention, "input_layernorm.weight", (shape.hidden,))
    yield _linear(before_mlp, "post_attention_layernorm.weight", (shape.hidden,))
    if shape.latent is None:
        yield from _attention(shape)
    else:
        yield from _latent_attention(shape, shape.latent, transformer_engine)
    if is_sparse and shape.experts is not None:
        yield from _experts(shape, shape.experts)
    else:
        yield from _mlp(shape)


def _norms(shape: Shape, is_sparse: bool, transformer_engine: bool) -> tuple[str, str]:
    """Name the norms before attention and MLP, which are stored as a part of what follows.

    Local layers that have latents store both apart; Transformer Engine's store apart only what is
    not followed by a linear layer.
    """
    before_attention = "self_attention.linear_qkv.layer_norm_weight"
    before_mlp = "mlp.linear_fc1.layer_norm_weight"
    if shape.latent is not None:
        before_attention = "input_layernorm.weight"
    if is_sparse if transformer_engine else shape.latent is not None:
        before_mlp = "pre_mlp_layernorm.weight"
    return before_attention, before_mlp


def _linear(key: str, name: str, shape: tuple[int, ...]) -> _Weight:
    """One tensor of a layer that is the same in both."""
    return _Weight(key, (f"model.layers.{{layer}}.{name}",), shape)


def _attention(shape: Shape) -> Iterator[_Weight]:
    query = shape.heads * shape.head
    qkv = query + 2 * shape.groups * shape.head

    def join(tensors: list[Tensor]) -> Tensor:
        """Put each group's queries before its key and value."""
        return torch.cat([t.unflatten(0, (shape.groups, -1)) for t in tensors], 1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        grouped = tensor.unflatten(0, (shape.groups, -1))
        sizes = [query // shape.groups, shape.head, shape.head]
        return [part.flatten(0, 1) for part in grouped.split(sizes, 1)]

    def qkv_of(kind: str, own_shape: tuple[int, ...]) -> _Weight:
        names = tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}" for part in "qkv")
        return _Weight(f"self_attention.linear_qkv.{kind}", names, own_shape, join, split)

    yield qkv_of("weight", (qkv, shape.hidden))
    projection = "self_attention.linear_proj."
    yield _linear(f"{projection}weight", "self_attn.o_proj.weight", (shape.hidden, query))
    if shape.has_qkv_bias or shape.has_attention_bias:
        yield qkv_of("bias", (qkv,))
    elif shape.has_bias:
        yield _absent("self_attention.linear_qkv.bias", (qkv,), "attention_bias")
    if shape.has_attention_bias:
        yield _linear(f"{projection}bias", "self_attn.o_proj.bias", (shape.hidden,))
    elif shape.has_bias:
        yield _absent(f"{projection}bias", (shape.hidden,), "attention_bias")
    if shape.has_qk_norm:
        for part in "qk":
            key = f"self_attention.{part}_layernorm.weight"
            yield _linear(key, f"self_attn.{part}_norm.weight", (shape.head,))


def _latent_attention(shape: Shape, latent: Latent, transformer_engine: bool) -> Iterator[_Weight]:
    query = shape.heads * (latent.unrotated + latent.rotated)
    key_value = shape.heads * (latent.unrotated + latent.value)

    def linear(key: str, name: str, *own_shape: int) -> _Weight:
        return _linear(f"self_attention.{key}", f"self_attn.{name}.weight", own_shape)

    def norm(part: str) -> str:
        if transformer_engine:
            return f"linear_{part}_up_proj.layer_norm_weight"
        return f"{part}_layernorm.weight"

    yield linear("linear_q_down_proj.weight", "q_a_proj", latent.query, shape.hidden)
    yield linear(norm("q"), "q_a_layernorm", latent.query)
    yield linear("linear_q_up_proj.weight", "q_b_proj", query, latent.query)
    down = latent.key_value + latent.rotated
    yield linear("linear_kv_down_proj.weight", "kv_a_proj_with_mqa", down, shape.hidden)
    yield linear(norm("kv"), "kv_a_layernorm", latent.key_value)
    yield linear("linear_kv_up_proj.weight", "kv_b_proj", key_value, latent.key_value)
    value = shape.heads * latent.value
    yield linear("linear_proj.weight", "o_proj", shape.hidden, value)


def _mlp(shape: Shape) -> Iterator[_Weight]:
    theirs = "model.layers.{layer}.mlp."
    yield _gated("mlp.linear_fc1.weight", theirs, shape.ffn, shape.hidden)
    yield _linear("mlp.linear_fc2.weight", "mlp.down_proj.weight", (shape.hidden, shape.ffn))
    if shape.has_mlp_bias:
        yield _gated("mlp.linear_fc1.bias", theirs, shape.ffn)
        yield _linear("mlp.linear_fc2.bias", "mlp.down_proj.bias", (shape.hidden,))
    elif shape.has_bias:
        yield _absent("mlp.linear_fc1.bias", (2 * shape.ffn,), "mlp_bias")
        yield _absent("mlp.linear_fc2.bias", (shape.hidden,), "mlp_bias")


def _gated(
    key: str,
    theirs: str,
    ffn: int,
    *hidden: int,
    parts: tuple[str, str] = ("gate_proj", "up_proj"),
    experts: int = 0,
) -> _Weight:
    """The gate above the value, as Megatron stacks them."""
    names = tuple(f"{theirs}{part}.{key.rpartition('.')[2]}" for part in parts)
    return _Weight(key, names, (2 * ffn, *hidden), torch.cat, _halves, experts)


def _experts(shape: Shape, experts: Experts) -> Iterator[_Weight]:
    is_mixtral = shape.family == "mixtral"
    own = "block_sparse_moe." if is_mixtral else "mlp."
    theirs = f"model.layers.{{layer}}.{own}"
    gate, down, up = ("w1", "w2", "w3") if is_mixtral else ("gate_proj", "down_proj", "up_proj")
    number, hidden = experts.number, shape.hidden
    yield _linear("mlp.router.weight", f"{own}gate.weight", (number, hidden))
    if experts.has_bias:
        name = f"{theirs}gate.e_score_correction_bias"
        yield _Weight("mlp.router.expert_bias", (name,), (number,), keeps_type=True)
    ours, one = "mlp.experts.experts.linear_", f"{theirs}experts.{{expert}}."
    yield _gated(f"{ours}fc1.weight", one, experts.ffn, hidden, parts=(gate, up), experts=number)
    width = (hidden, experts.ffn)
    yield _Weight(f"{ours}fc2.weight", (f"{one}{down}.weight",), width, experts=number)
    if experts.shared_ffn:
        shared = "shared_expert" if experts.has_shared_gate else "shared_experts"
        ours = "mlp.shared_experts."
        yield _gated(f"{ours}linear_fc1.weight", f"{theirs}{shared}.", experts.shared_ffn, hidden)
        width = (hidden, experts.shared_ffn)
        yield _linear(f"{ours}linear_fc2.weight", f"{own}{shared}.down_proj.weight", width)
    if experts.has_shared_gate:
        yield _linear(f"{ours}gate_weight", f"{own}shared_expert_gate.weight", (1, hidden))


def _absent(key: str, shape: tuple[int, ...], setting: str) -> _Weight:
    """A bias that only Megatron has: zeros on the way there, and nothing else on the way back."""

    def split(tensor: Tensor) -> list[Tensor]:
        if tensor.any():
            raise ConversionError(
                f"{key} is not zero and has no place in the model: set {setting} to true in "
                "config.json"
            )
        return []

    return _Weight(key, (), shape, partial(_zeros, shape), split)


def _zeros(shape: tuple[int, ...], tensors: list[Tensor]) -> Tensor:
    assert not tensors
    return torch.zeros(shape)
