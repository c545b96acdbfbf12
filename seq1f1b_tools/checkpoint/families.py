"""The families of models that are converted: from their settings to the shape of a decoder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from seq1f1b_tools.checkpoint.config import Config, read_config
from seq1f1b_tools.checkpoint.problem import ConversionError
from seq1f1b_tools.checkpoint.rope import Rope, read_rope

_LATENT_EPSILON = 1e-6  # of DeepSeek's norms of latents in transformers, whatever rms_norm_eps is

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Experts:
    """The experts of a layer and how tokens reach them.

    number: experts. routed: of these, how many a token goes to. ffn: width of one.
    is_sparse: for each layer, whether it has experts; the others have an MLP.
    shared_ffn: width of the expert that every token goes to; 0 without.
    has_shared_gate: whether that one is scaled by a gate of its own.
    score: softmax or sigmoid. pre_softmax: whether scores are taken over all experts, and those of
    the chosen ones are not made to add up to one.
    has_bias: whether a bias takes part in choosing. scaling: factor on the scores.
    groups, routed_groups: experts are chosen from ``routed_groups`` of ``groups`` groups; None
    without groups.
    in_float32: whether the router computes in float32 whatever the model does.
    """

    number: int
    routed: int
    ffn: int
    is_sparse: tuple[bool, ...]
    shared_ffn: int = 0
    has_shared_gate: bool = False
    score: str = "softmax"
    pre_softmax: bool = False
    has_bias: bool = False
    scaling: float = 1.0
    groups: int | None = None
    routed_groups: int | None = None
    in_float32: bool = False

    @property
    def in_every_layer(self) -> bool:
        """Whether no layer has an MLP instead."""
        return all(self.is_sparse)


@dataclass(frozen=True)
class Latent:
    """Widths of multi-head latent attention: of the latents, and of parts of a head.

    unrotated, rotated: parts of a query or key.
    """

    query: int
    key_value: int
    unrotated: int
    rotated: int
    value: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder and what it is made of.

    head: width of a head. ffn: width of the MLP. groups: heads of keys and values.
    positions: the longest sequence that the model computes as transformers does.
    window: of a sliding window that all shorter sequences fit into; None without.
    has_qkv_bias: whether only queries, keys and values have biases. has_attention_bias,
    has_mlp_bias: whether all linear layers of the part have one.
    mtp_layers: layers for multi-token prediction that may be stored beside the others.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocabulary: int
    positions: int
    rope: Rope
    norm_epsilon: float
    is_tied: bool
    window: int | None = None
    has_qkv_bias: bool = False
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    experts: Experts | None = None
    latent: Latent | None = None
    mtp_layers: int = 0

    @property
    def has_bias(self) -> bool:
        """Whether Megatron's linear layers have biases, as all of a model have or none."""
        return self.has_attention_bias or self.has_mlp_bias

    @property
    def is_stacked(self) -> bool:
        """Whether Megatron stacks the layers in its checkpoints, as it does if all are alike."""
        return self.experts is None or self.experts.in_every_layer

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and self.experts.is_sparse[layer]


def read_shape(folder: Path) -> Shape:
    """Read ``folder/config.json``; raises ConversionError for what cannot be converted."""
    config = read_config(folder, FAMILIES)
    return _READERS[config.family](config)


def _decoder(config: Config, *, window: int | None = None) -> Shape:
    """Read what all families have."""
    config.require("hidden_act", "silu")
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    groups = config.optional_whole("num_key_value_heads") or heads
    if heads % groups:
        raise config.refusal("num_key_value_heads", f"does not divide {heads} attention heads")
    head = config.optional_whole("head_dim") or hidden // heads
    if head < 2 or head % 2:
        raise ConversionError(f"{config.file}: the width of a head is {head}, not even")
    positions = config.whole("max_position_embeddings")
    window = window if window is not None and window < positions else None
    return Shape(
        family=config.family,
        layers=config.whole("num_hidden_layers", most=_MOST_LAYERS),
        hidden=hidden,
        ffn=config.whole("intermediate_size"),
        heads=heads,
        groups=groups,
        head=head,
        vocabulary=config.whole("vocab_size"),
        positions=window or positions,
        rope=read_rope(config),
        norm_epsilon=config.number("rms_norm_eps"),
        is_tied=config.switch("tie_word_embeddings"),
        window=window,
    )


def _llama(config: Config) -> Shape:
    return replace(
        _decoder(config),
        has_attention_bias=config.switch("attention_bias"),
        has_mlp_bias=config.switch("mlp_bias"),
    )


def _mistral(config: Config) -> Shape:
    return _decoder(config, window=config.optional_whole("sliding_window"))


def _mixtral(config: Config) -> Shape:
    shape = _mistral(config)
    return replace(shape, experts=_normalised(config, "num_local_experts", shape.ffn, shape.layers))


def _qwen_window(config: Config) -> int | None:
    """Return the window of those layers that have one, if any has."""
    if not config.switch("use_sliding_window"):
        return None
    return config.optional_whole("sliding_window")


def _qwen2(config: Config) -> Shape:
    return replace(_decoder(config, window=_qwen_window(config)), has_qkv_bias=True)


def _qwen3(config: Config) -> Shape:
    config.require("attention_bias", False)
    return replace(_decoder(config, window=_qwen_window(config)), has_qk_norm=True)


def _qwen2_moe(config: Config) -> Shape:
    shape = _decoder(config, window=_qwen_window(config))
    experts = replace(
        _qwen_experts(config, shape),
        shared_ffn=config.whole("shared_expert_intermediate_size"),
        has_shared_gate=True,
    )
    return replace(shape, has_qkv_bias=config.switch("qkv_bias"), experts=experts)


def _qwen3_moe(config: Config) -> Shape:
    shape = _qwen3(config)
    return replace(shape, experts=_qwen_experts(config, shape))


def _qwen_experts(config: Config, shape: Shape) -> Experts:
    dense, step = config.get("mlp_only_layers") or (), config.whole("decoder_sparse_step")
    experts = _normalised(
        config, "num_experts", config.whole("moe_intermediate_size"), shape.layers
    )
    is_sparse = tuple(
        layer not in dense and (layer + 1) % step == 0 for layer in range(shape.layers)
    )
    if not any(is_sparse):
        raise config.refusal("mlp_only_layers", "leaves no layer with experts")
    return replace(experts, is_sparse=is_sparse)


def _normalised(config: Config, number: str, ffn: int, layers: int) -> Experts:
    """Return experts whose scores add up to one, unless the settings say that they do not."""
    experts, routed = config.whole(number), config.whole("num_experts_per_tok")
    if routed > experts:
        raise config.refusal("num_experts_per_tok", f"is more than there are experts, {experts}")
    adds_up = config.get("norm_topk_prob") is None or config.switch("norm_topk_prob")
    if adds_up and routed == 1:
        raise config.refusal(
            "num_experts_per_tok",
            "is not converted: Megatron does not make the score of a single expert one",
        )
    return Experts(experts, routed, ffn, (True,) * layers, pre_softmax=not adds_up)


def _deepseek(config: Config) -> Shape:
    """Read what both versions have; the experts still lack how tokens are routed."""
    config.require("attention_bias", False, None)
    config.require("mlp_bias", False, None)
    if config.number("rms_norm_eps") != _LATENT_EPSILON:
        raise config.refusal(
            "rms_norm_eps",
            f"is not converted: transformers has {_LATENT_EPSILON} in the norms of latents, and "
            "Megatron has one for all norms",
        )
    if config.get("q_lora_rank") is None:
        raise config.refusal(
            "q_lora_rank",
            "is not converted: Megatron normalises the latents of keys and values only where "
            "queries have latents too",
        )
    shape = _decoder(config)
    if shape.groups != shape.heads:
        raise config.refusal(
            "num_key_value_heads", f"must be the number of attention heads, {shape.heads}"
        )
    dense = config.whole("first_k_dense_replace", least=0)
    if dense >= shape.layers:
        raise config.refusal("first_k_dense_replace", "leaves no layer with experts")
    experts, routed = config.whole("n_routed_experts"), config.whole("num_experts_per_tok")
    if routed > experts:
        raise config.refusal("num_experts_per_tok", f"is more than there are experts, {experts}")
    ffn = config.whole("moe_intermediate_size")
    return replace(
        shape,
        latent=Latent(
            query=config.whole("q_lora_rank"),
            key_value=config.whole("kv_lora_rank"),
            unrotated=config.whole("qk_nope_head_dim"),
            rotated=config.whole("qk_rope_head_dim"),
            value=config.whole("v_head_dim"),
        ),
        experts=Experts(
            experts,
            routed,
            ffn,
            tuple(layer >= dense for layer in range(shape.layers)),
            shared_ffn=ffn * config.whole("n_shared_experts"),
            scaling=config.number("routed_scaling_factor"),
            in_float32=True,
        ),
    )


def _deepseek_v2(config: Config) -> Shape:
    shape = _deepseek(config)
    config.require("norm_topk_prob", False, None)
    config.require("topk_method", "greedy", "group_limited_greedy")
    # a group counts as much as its best expert
    groups = _groups(config, shape, 1) if config.get("topk_method") != "greedy" else (None, None)
    return _routed(shape, groups, pre_softmax=True)


def _deepseek_v3(config: Config) -> Shape:
    shape = _deepseek(config)
    config.require("rope_interleave", True)
    config.require("norm_topk_prob", True)
    assert shape.experts is not None
    if shape.experts.routed == 1:
        raise config.refusal(
            "num_experts_per_tok",
            "is not converted: Megatron does not make the score of a single expert one",
        )
    # a group counts as much as its best two experts
    routed = _routed(shape, _groups(config, shape, 2), score="sigmoid", has_bias=True)
    return replace(routed, mtp_layers=config.whole("num_nextn_predict_layers", least=0))


def _groups(config: Config, shape: Shape, counted: int) -> tuple[int | None, int | None]:
    """Return groups of experts and how many of them are chosen from; None where all are.

    ``counted``: experts of a group whose scores decide on it. Megatron has the number of experts
    that a token goes to by the number of groups.
    """
    assert shape.experts is not None
    number, routed = shape.experts.number, shape.experts.routed
    groups, chosen = config.whole("n_group"), config.whole("topk_group")
    if number % groups:
        raise config.refusal("n_group", f"does not divide {number} experts")
    if chosen > groups or routed > chosen * (number // groups):
        raise config.refusal("topk_group", f"does not fit {groups} groups and {routed} experts")
    if chosen == groups:
        return None, None
    if routed // chosen != counted or number // groups < counted:
        raise config.refusal(
            "topk_group",
            f"is not converted: a group counts as much as its best {counted} experts in "
            f"transformers and as its best {routed // chosen} in Megatron",
        )
    return groups, chosen


def _routed(
    shape: Shape,
    groups: tuple[int | None, int | None],
    *,
    score: str = "softmax",
    pre_softmax: bool = False,
    has_bias: bool = False,
) -> Shape:
    assert shape.experts is not None
    experts = replace(
        shape.experts,
        score=score,
        pre_softmax=pre_softmax,
        has_bias=has_bias,
        groups=groups[0],
        routed_groups=groups[1],
    )
    return replace(shape, experts=experts)


_READERS: dict[str, Callable[[Config], Shape]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
FAMILIES = tuple(_READERS)
