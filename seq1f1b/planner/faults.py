"""What is wrong with options, before anything is derived from them."""

from collections.abc import Iterator

from seq1f1b.planner.arguments import Arguments, options
from seq1f1b.planner.model import expert_pattern


def missing(a: Arguments) -> Iterator[str]:
    """Yield what a model cannot be without."""
    for name, flag in (
        ("num_layers", "--num-layers"),
        ("hidden_size", "--hidden-size"),
        ("num_attention_heads", "--num-attention-heads"),
        ("seq_length", "--seq-length"),
    ):
        if getattr(a, name) is None:
            yield f"{flag}: required (or name a model with --model)"


def not_positive(a: Arguments) -> Iterator[str]:
    """Yield numbers out of their range."""
    for option in options():
        value = getattr(a, option.name)
        if option.type is int and isinstance(value, int) and value < 1:
            yield f"{option.flags[0]} {value}: must be at least 1"
    for flag, value in (
        ("--hidden-dropout", a.hidden_dropout),
        ("--attention-dropout", a.attention_dropout),
    ):
        if not 0 <= value < 1:
            yield f"{flag} {value}: must be from 0 to below 1"


def model_faults(a: Arguments) -> Iterator[str]:
    """Yield what Megatron would refuse of the model alone."""
    heads, hidden = a.num_attention_heads or 1, a.hidden_size or 1
    if a.kv_channels is None and not a.multi_latent_attention and hidden % heads:
        yield (
            f"--num-attention-heads {heads}: does not divide --hidden-size {hidden}; "
            "give --kv-channels"
        )
    if a.group_query_attention and heads % a.num_query_groups:
        yield f"--num-query-groups {a.num_query_groups}: does not divide {heads} attention heads"
    if a.group_query_attention and a.multi_latent_attention:
        yield "--group-query-attention: cannot go with --multi-latent-attention"
    if a.fp16 and a.bf16:
        yield "--fp16 and --bf16: choose one"
    if a.seq_length and a.max_position_embeddings and a.max_position_embeddings < a.seq_length:
        yield (
            f"--max-position-embeddings {a.max_position_embeddings}: below --seq-length "
            f"{a.seq_length}"
        )
    if a.position_embedding_type == "relative":
        yield "--position-embedding-type relative: a GPT has no relative positions"
    if a.mtp_num_layers and a.position_embedding_type not in ("rope", "none"):
        yield "--mtp-num-layers: needs --position-embedding-type rope or none"
    if a.overlap_param_gather and not (a.use_distributed_optimizer and a.overlap_grad_reduce):
        yield "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce"
    if a.optimizer not in ("adam", "sgd"):
        yield f"--optimizer {a.optimizer}: only the states of adam and sgd are modelled"
    if a.num_experts:
        if a.moe_router_topk > a.num_experts:
            yield f"--moe-router-topk {a.moe_router_topk}: there are {a.num_experts} experts"
        try:
            expert_pattern(a.moe_layer_freq, a.num_layers or 1)
        except ValueError as error:
            yield f"--moe-layer-freq: {error}"
    yield from _recompute_faults(a)


def _recompute_faults(a: Arguments) -> Iterator[str]:
    if a.recompute_granularity == "full":
        if a.recompute_method is None:
            yield "--recompute-granularity full: needs --recompute-method uniform or block"
        if a.recompute_num_layers is None:
            yield "--recompute-granularity full: needs --recompute-num-layers"
        if a.recompute_modules is not None:
            yield "--recompute-modules: goes with --recompute-granularity selective only"
    elif a.recompute_method is not None or a.recompute_num_layers is not None:
        yield (
            "--recompute-method and --recompute-num-layers: go with --recompute-granularity full "
            "only"
        )
    if a.recompute_granularity is None and a.recompute_modules is not None:
        yield "--recompute-modules: needs --recompute-granularity selective"
    if a.seq1f1b_recompute_loss and a.mtp_num_layers:
        yield "--seq1f1b-recompute-loss: cannot go with --mtp-num-layers"


def length_faults(a: Arguments, lengths: tuple[int, ...]) -> Iterator[str]:
    """Yield what is wrong with given lengths of sub-sequences."""
    words = f"--seq1f1b-lengths {' '.join(map(str, lengths))}"
    if sum(lengths) != a.seq_length:
        yield f"{words}: sum to {sum(lengths)}, not to --seq-length {a.seq_length}"
    if min(lengths) < 1:
        yield f"{words}: must be positive"
    if a.seq1f1b_splits is not None and int(a.seq1f1b_splits) != len(lengths):
        yield f"{words}: {len(lengths)} lengths for {a.seq1f1b_splits} splits"
