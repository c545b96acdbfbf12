"""Which of Hugging Face's tensors make up which of Megatron's, for every family."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from seq1f1b_tools.checkpoint.families import Shape


@dataclass(frozen=True)
class Piece:
    """A part of one of Megatron's tensors that is made of Hugging Face's whole tensors.

    Megatron stacks the layers, and in a layer the experts, of one kind of weight: ``key`` has shape
    ``whole``, of which this is what lies at ``offsets``, ``sizes`` long; the first ``num_axes`` of
    these count layers and experts. ``names`` are Hugging Face's, ``shapes`` theirs.
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
    axes: tuple[int, ...] = ()
    join: Callable[[list[Tensor]], Tensor] = _same
    split: Callable[[Tensor], list[Tensor]] = _alone

    def pieces(self) -> Iterator[Piece]:
        shapes = tuple(
            tuple(part.shape) for part in self.split(torch.empty(self.shape, device="meta"))
        )
        for place in product(*map(range, self.axes)):
            numbers = dict(zip(("layer", "expert"), place, strict=False))
            yield Piece(
                self.key,
                (*self.axes, *self.shape),
                (*place, *(0 for _ in self.shape)),
                (*(1 for _ in place), *self.shape),
                len(place),
                tuple(name.format(**numbers) for name in self.names),
                shapes,
                self.join,
                self.split,
            )


def pieces(shape: Shape, *, transformer_engine: bool = False) -> list[Piece]:
    """Return all pieces of a model.

    ``transformer_engine`` says whose layers will load the checkpoint: they name one norm otherwise
    where there are experts.
    """
    return [piece for weight in _weights(shape, transformer_engine) for piece in weight.pieces()]


def _weights(shape: Shape, transformer_engine: bool) -> list[_Weight]:
    ours, theirs, layers = "decoder.layers.", "model.layers.{layer}.", (shape.layers,)
    hidden, query = shape.hidden, shape.heads * shape.head
    qkv = query + 2 * shape.groups * shape.head
    attention, theirs_attention = f"{ours}self_attention.", f"{theirs}self_attn."

    def join_qkv(tensors: list[Tensor]) -> Tensor:
        """Put each group's queries before its key and value."""
        return torch.cat([t.unflatten(0, (shape.groups, -1)) for t in tensors], 1).flatten(0, 1)

    def split_qkv(tensor: Tensor) -> list[Tensor]:
        grouped = tensor.unflatten(0, (shape.groups, -1))
        sizes = [query // shape.groups, shape.head, shape.head]
        return [part.flatten(0, 1) for part in grouped.split(sizes, 1)]

    def qkv_of(kind: str, own_shape: tuple[int, ...]) -> _Weight:
        names = tuple(f"{theirs_attention}{part}_proj.{kind}" for part in "qkv")
        return _Weight(
            f"{attention}linear_qkv.{kind}", names, own_shape, layers, join_qkv, split_qkv
        )

    def norm(key: str, name: str, size: int = hidden) -> _Weight:
        return _Weight(ours + key, (f"{theirs}{name}.weight",), (size,), layers)

    vocabulary = (shape.vocabulary, hidden)
    weights = [
        _Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        _Weight("decoder.final_layernorm.weight", ("model.norm.weight",), (hidden,)),
        norm("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
        qkv_of("weight", (qkv, hidden)),
        _Weight(
            f"{attention}linear_proj.weight",
            (f"{theirs_attention}o_proj.weight",),
            (hidden, query),
            layers,
        ),
        norm(_mlp_norm(shape, transformer_engine), "post_attention_layernorm"),
        *(_experts(shape) if shape.experts else _mlp(shape)),
    ]
    if not shape.is_tied:
        weights.append(_Weight("output_layer.weight", ("lm_head.weight",), vocabulary))
    if shape.has_qkv_bias:
        weights.append(qkv_of("bias", (qkv,)))
    if shape.has_qk_norm:
        weights += [
            norm(f"self_attention.{part}_layernorm.weight", f"self_attn.{part}_norm", shape.head)
            for part in "qk"
        ]
    return weights


def _mlp_norm(shape: Shape, transformer_engine: bool) -> str:
    is_apart = shape.experts and transformer_engine
    return "pre_mlp_layernorm.weight" if is_apart else "mlp.linear_fc1.layer_norm_weight"


def _mlp(shape: Shape) -> list[_Weight]:
    ours, theirs = "decoder.layers.mlp.linear_", "model.layers.{layer}.mlp."
    gate_and_value = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    sizes, layers = (2 * shape.ffn, shape.hidden), (shape.layers,)
    return [
        _Weight(f"{ours}fc1.weight", gate_and_value, sizes, layers, torch.cat, _halves),
        _Weight(
            f"{ours}fc2.weight",
            (f"{theirs}down_proj.weight",),
            (shape.hidden, shape.ffn),
            layers,
        ),
    ]


def _experts(shape: Shape) -> list[_Weight]:
    ours, theirs = "decoder.layers.mlp.", "model.layers.{layer}.block_sparse_moe."
    one = theirs + "experts.{expert}."
    axes = (shape.layers, shape.experts)
    return [
        _Weight(
            f"{ours}router.weight",
            (f"{theirs}gate.weight",),
            (shape.experts, shape.hidden),
            axes[:1],
        ),
        _Weight(
            f"{ours}experts.experts.linear_fc1.weight",
            (f"{one}w1.weight", f"{one}w3.weight"),
            (2 * shape.ffn, shape.hidden),
            axes,
            torch.cat,
            _halves,
        ),
        _Weight(
            f"{ours}experts.experts.linear_fc2.weight",
            (f"{one}w2.weight",),
            (shape.hidden, shape.ffn),
            axes,
        ),
    ]
