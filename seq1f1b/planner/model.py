"""A transformer's sizes, with everything that Megatron derives filled in."""

import ast
import re
from dataclasses import dataclass
from functools import lru_cache

from seq1f1b.planner.arguments import Arguments
from seq1f1b.sequence import LatentAttention, TokenCost


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: how many, how many a token is sent to, and their widths."""

    count: int
    topk: int
    ffn: int
    shared_ffn: int


@dataclass(frozen=True)
class Model:
    """Sizes of a GPT.

    groups: heads of keys and values. head: size of a head. rotary: whether positions are rotary;
    learned_positions: rows of the table of learned ones, or 0. vocabulary: tokens, before padding.
    expert_layers: for each layer whether its MLP is a mixture of experts. mtp: layers of
    multi-token prediction.
    """

    num_layers: int
    hidden: int
    heads: int
    groups: int
    head: int
    ffn: int
    gated: bool
    rms_norm: bool
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    tied: bool
    rotary: bool
    learned_positions: int
    vocabulary: int
    latent: LatentAttention | None
    experts: Experts | None
    expert_layers: tuple[bool, ...]
    mtp: int

    @property
    def query_width(self) -> int:
        """Elements of one token's queries, all heads."""
        latent = self.latent
        return self.heads * (latent.head + latent.rotary if latent else self.head)

    @property
    def key_width(self) -> int:
        """Elements of one token's keys as attention takes them."""
        return self.query_width if self.latent else self.groups * self.head

    @property
    def value_width(self) -> int:
        """Elements of one token's values as attention takes them."""
        return self.heads * self.latent.value if self.latent else self.groups * self.head

    @property
    def output_width(self) -> int:
        """Elements of one token's attention output."""
        return self.heads * (self.latent.value if self.latent else self.head)

    def token_cost(self, vocabulary: int) -> TokenCost:
        """Return the operations of a token, as the cut of a sequence weighs them.

        ``vocabulary`` is the padded one. A mixture of experts counts the experts that one token
        goes through, in every layer, as the training run does.
        """
        ffn = self.ffn
        if self.experts is not None:
            ffn = self.experts.ffn * self.experts.topk + self.experts.shared_ffn
        return TokenCost.of_transformer(
            num_layers=self.num_layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            kv_channels=self.head,
            num_query_groups=self.groups,
            ffn_hidden_size=ffn,
            gated_linear_unit=self.gated,
            vocab_size=vocabulary,
            latent=self.latent,
        )


def default_ffn(hidden: int, *, gated: bool) -> int:
    """Return Megatron's width of an MLP that none was given for."""
    return int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden


@lru_cache(maxsize=64)
def expert_pattern(frequency: int | str, num_layers: int) -> tuple[bool, ...]:
    """Return which layers have experts; ``frequency`` as in --moe-layer-freq.

    Raises ValueError for a pattern of another length, or something that is none.
    """
    text = str(frequency)
    if text.isdecimal() and int(text) > 0:
        return tuple(layer % int(text) == 0 for layer in range(num_layers))
    pattern = _evaluate(text)
    if len(pattern) != num_layers:
        raise ValueError(f"{text} has {len(pattern)} layers, the model {num_layers}")
    return tuple(bool(entry) for entry in pattern)


def _evaluate(text: str) -> list[int]:
    """Evaluate an expression of lists of 0 and 1, ``+`` and ``*``."""
    if not re.fullmatch(r"[\[\]()01,+*\d\s]+", text):
        raise ValueError(f"{text!r} is neither a number nor lists of 0 and 1")
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError):
        raise ValueError(f"{text!r} is neither a number nor lists of 0 and 1") from None
    if not isinstance(value, list) or not set(value) <= {0, 1}:
        raise ValueError(f"{text!r} is neither a number nor lists of 0 and 1")
    return value


def _value(node: ast.expr) -> list[int] | int:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=elements):
            return [_number(element) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)  # type: ignore[operator]
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)  # type: ignore[operator]
    raise TypeError(node)


def _number(node: ast.expr) -> int:
    value = _value(node)
    if isinstance(value, int):
        return value
    raise TypeError(node)


def model_of(arguments: Arguments) -> Model:
    """Derive a model from arguments that passed validation."""
    a = arguments
    assert a.num_layers is not None
    assert a.hidden_size is not None
    assert a.num_attention_heads is not None
    ffn = a.ffn_hidden_size or default_ffn(a.hidden_size, gated=a.swiglu)
    position = "rope" if a.use_rotary_position_embeddings else a.position_embedding_type
    latent = experts = None
    pattern = (False,) * a.num_layers
    if a.multi_latent_attention:
        latent = LatentAttention(
            query_rank=a.q_lora_rank,
            kv_rank=a.kv_lora_rank,
            head=a.qk_head_dim,
            rotary=a.qk_pos_emb_head_dim,
            value=a.v_head_dim,
        )
    if a.num_experts:
        experts = Experts(
            count=a.num_experts,
            topk=a.moe_router_topk,
            ffn=a.moe_ffn_hidden_size or ffn,
            shared_ffn=a.moe_shared_expert_intermediate_size or 0,
        )
        pattern = expert_pattern(a.moe_layer_freq, a.num_layers)
    return Model(
        num_layers=a.num_layers,
        hidden=a.hidden_size,
        heads=a.num_attention_heads,
        groups=a.num_query_groups if a.group_query_attention else a.num_attention_heads,
        head=a.kv_channels or a.hidden_size // a.num_attention_heads,
        ffn=ffn,
        gated=a.swiglu,
        rms_norm=a.normalization == "RMSNorm",
        bias=a.add_bias_linear,
        qkv_bias=a.add_bias_linear or a.add_qkv_bias,
        qk_norm=a.qk_layernorm,
        tied=not a.untie_embeddings_and_output_weights,
        rotary=position in ("rope", "yarn", "mrope"),
        learned_positions=(
            (a.max_position_embeddings or a.seq_length or 0)
            if position == "learned_absolute"
            else 0
        ),
        vocabulary=a.vocab_size or a.padded_vocab_size or 0,
        latent=latent,
        experts=experts,
        expert_layers=pattern,
        mtp=a.mtp_num_layers or 0,
    )
