"""Megatron's options that the planner reads: one table with names, types and defaults."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple

MODEL = "Model (Megatron's options)"
ATTENTION = "Attention (Megatron's options)"
EXPERTS = "Mixture of experts (Megatron's options)"
PARALLEL = "Parallelism (Megatron's options)"
BATCH = "Batch (Megatron's options)"
MEMORY = "Precision, optimizer and recomputation (Megatron's options)"
KERNELS = "Kernels (Megatron's options)"
SUB_SEQUENCES = "Sub-sequences"

RECOMPUTE_MODULES = (
    "core_attn",
    "moe_act",
    "layernorm",
    "mla_up_proj",
    "mlp",
    "moe",
    "shared_experts",
)


class Option(NamedTuple):
    """One option of the command line.

    flags: its names, Megatron's first. type: of its value; None for a flag without a value.
    many: whether it takes several values. panel: the section of the help text.
    """

    name: str
    flags: tuple[str, ...]
    type: type | None
    default: Any
    choices: tuple[str, ...] | None
    many: bool
    panel: str
    help: str


def _option(
    panel: str,
    flags: str,
    default: Any,
    help: str,
    *,
    type: type | None = None,
    choices: Sequence[str] | None = None,
    many: bool = False,
) -> Any:
    """Declare a field of ``Arguments`` with what its option needs."""
    entry = (tuple(flags.split()), type, tuple(choices) if choices else None, many, panel, help)
    return field(default=default, metadata={"option": entry})


@dataclass(frozen=True)
class Arguments:
    """What a Megatron command line says, before anything is derived from it.

    Names, types and defaults are those of Megatron's parser; ``None`` means that Megatron derives
    the value from others.
    """

    # model
    num_layers: int | None = _option(
        MODEL, "--num-layers --layers", None, "Transformer layers.", type=int
    )
    hidden_size: int | None = _option(
        MODEL, "--hidden-size", None, "Width of the residual stream.", type=int
    )
    num_attention_heads: int | None = _option(
        MODEL, "--num-attention-heads --heads", None, "Attention heads.", type=int
    )
    seq_length: int | None = _option(MODEL, "--seq-length", None, "Tokens of a sequence.", type=int)
    max_position_embeddings: int | None = _option(
        MODEL, "--max-position-embeddings", None, "Longest position. [--seq-length]", type=int
    )
    ffn_hidden_size: int | None = _option(
        MODEL,
        "--ffn-hidden-size",
        None,
        "Width of the MLP. [4 x hidden size; with --swiglu 8/3 x, rounded as Megatron does]",
        type=int,
    )
    swiglu: bool = _option(MODEL, "--swiglu", False, "Gated MLP with SiLU.")
    squared_relu: bool = _option(MODEL, "--squared-relu", False, "Squared ReLU in the MLP.")
    normalization: str = _option(
        MODEL,
        "--normalization",
        "LayerNorm",
        "Kind of norm.",
        type=str,
        choices=("LayerNorm", "RMSNorm"),
    )
    add_bias_linear: bool = _option(
        MODEL, "--disable-bias-linear", True, "No biases in linear layers."
    )
    add_qkv_bias: bool = _option(
        MODEL, "--add-qkv-bias", False, "Biases in the QKV projection alone."
    )
    untie_embeddings_and_output_weights: bool = _option(
        MODEL,
        "--untie-embeddings-and-output-weights",
        False,
        "The output layer has weights of its own.",
    )
    position_embedding_type: str = _option(
        MODEL,
        "--position-embedding-type",
        "learned_absolute",
        "Kind of position embedding.",
        type=str,
        choices=("learned_absolute", "rope", "yarn", "mrope", "relative", "none"),
    )
    use_rotary_position_embeddings: bool = _option(
        MODEL, "--use-rotary-position-embeddings", False, "Same as --position-embedding-type rope."
    )
    vocab_size: int | None = _option(
        MODEL, "--vocab-size", None, "Tokens of the vocabulary, before padding.", type=int
    )
    padded_vocab_size: int | None = _option(
        MODEL, "--padded-vocab-size", None, "Size of the vocabulary after padding.", type=int
    )
    make_vocab_size_divisible_by: int = _option(
        MODEL,
        "--make-vocab-size-divisible-by",
        128,
        "Pad the vocabulary to a multiple of this times the tensor-parallel size.",
        type=int,
    )
    hidden_dropout: float = _option(
        MODEL, "--hidden-dropout", 0.1, "Dropout of the residual stream.", type=float
    )
    attention_dropout: float = _option(
        MODEL,
        "--attention-dropout",
        0.1,
        "Dropout of attention; sub-sequences need 0.",
        type=float,
    )
    mtp_num_layers: int | None = _option(
        MODEL, "--mtp-num-layers", None, "Layers of multi-token prediction.", type=int
    )

    # attention
    kv_channels: int | None = _option(
        ATTENTION, "--kv-channels", None, "Size of a head. [hidden size / heads]", type=int
    )
    group_query_attention: bool = _option(
        ATTENTION, "--group-query-attention", False, "Groups of heads share keys and values."
    )
    num_query_groups: int = _option(
        ATTENTION,
        "--num-query-groups --query-groups",
        1,
        "Key and value heads, with --group-query-attention.",
        type=int,
    )
    qk_layernorm: bool = _option(ATTENTION, "--qk-layernorm", False, "Norms of queries and keys.")
    multi_latent_attention: bool = _option(
        ATTENTION, "--multi-latent-attention", False, "Multi-latent attention (MLA)."
    )
    q_lora_rank: int | None = _option(
        ATTENTION, "--q-lora-rank", None, "MLA: width of the compressed query.", type=int
    )
    kv_lora_rank: int = _option(
        ATTENTION, "--kv-lora-rank", 32, "MLA: width of compressed keys and values.", type=int
    )
    qk_head_dim: int = _option(
        ATTENTION, "--qk-head-dim", 128, "MLA: a head's key without its rotary part.", type=int
    )
    qk_pos_emb_head_dim: int = _option(
        ATTENTION, "--qk-pos-emb-head-dim", 64, "MLA: rotary part of a head's key.", type=int
    )
    v_head_dim: int = _option(ATTENTION, "--v-head-dim", 128, "MLA: a head's value.", type=int)

    # experts
    num_experts: int | None = _option(
        EXPERTS, "--num-experts", None, "Experts of a layer.", type=int
    )
    moe_layer_freq: int | str = _option(
        EXPERTS,
        "--moe-layer-freq",
        1,
        "Every Nth layer has experts, or a list such as [0]*3+[1]*58.",
        type=str,
    )
    moe_ffn_hidden_size: int | None = _option(
        EXPERTS, "--moe-ffn-hidden-size", None, "Width of an expert. [--ffn-hidden-size]", type=int
    )
    moe_router_topk: int = _option(
        EXPERTS, "--moe-router-topk", 2, "Experts that a token is sent to.", type=int
    )
    moe_shared_expert_intermediate_size: int | None = _option(
        EXPERTS,
        "--moe-shared-expert-intermediate-size",
        None,
        "Width of all shared experts together.",
        type=int,
    )
    moe_token_dispatcher_type: str = _option(
        EXPERTS,
        "--moe-token-dispatcher-type",
        "allgather",
        "How tokens get to their experts.",
        type=str,
        choices=("allgather", "alltoall", "flex"),
    )

    # parallelism
    tensor_model_parallel_size: int = _option(
        PARALLEL, "--tensor-model-parallel-size", 1, "Tensor-parallel ranks (TP).", type=int
    )
    pipeline_model_parallel_size: int = _option(
        PARALLEL, "--pipeline-model-parallel-size --stages", 1, "Pipeline stages (PP).", type=int
    )
    num_virtual_stages_per_pipeline_rank: int | None = _option(
        PARALLEL,
        "--num-virtual-stages-per-pipeline-rank --chunks",
        None,
        "Model chunks of a stage (VPP).",
        type=int,
    )
    num_layers_per_virtual_pipeline_stage: int | None = _option(
        PARALLEL,
        "--num-layers-per-virtual-pipeline-stage",
        None,
        "Layers of a model chunk, instead of the number of chunks.",
        type=int,
    )
    pipeline_model_parallel_layout: str | None = _option(
        PARALLEL,
        "--pipeline-model-parallel-layout",
        None,
        "Layers of every model chunk, in Megatron's notation, such as Et*3|(tt|)*6tL.",
        type=str,
    )
    decoder_first_pipeline_num_layers: int | None = _option(
        PARALLEL, "--decoder-first-pipeline-num-layers", None, "Layers of stage 0.", type=int
    )
    decoder_last_pipeline_num_layers: int | None = _option(
        PARALLEL, "--decoder-last-pipeline-num-layers", None, "Layers of the last stage.", type=int
    )
    account_for_embedding_in_pipeline_split: bool = _option(
        PARALLEL,
        "--account-for-embedding-in-pipeline-split",
        False,
        "Count the embedding as a layer when layers are dealt out.",
    )
    account_for_loss_in_pipeline_split: bool = _option(
        PARALLEL,
        "--account-for-loss-in-pipeline-split",
        False,
        "Count the output layer as a layer when layers are dealt out.",
    )
    microbatch_group_size_per_vp_stage: int | None = _option(
        PARALLEL,
        "--microbatch-group-size-per-virtual-pipeline-stage",
        None,
        "Interleaved: micro-batches that go through a chunk in a turn. [number of stages]",
        type=int,
    )
    context_parallel_size: int = _option(
        PARALLEL, "--context-parallel-size", 1, "Context-parallel ranks (CP).", type=int
    )
    cp_comm_type: tuple[str, ...] = _option(
        PARALLEL,
        "--cp-comm-type",
        ("p2p",),
        "How context parallelism communicates; sub-sequences need a2a.",
        type=str,
        many=True,
    )
    expert_model_parallel_size: int = _option(
        PARALLEL, "--expert-model-parallel-size", 1, "Expert-parallel ranks (EP).", type=int
    )
    expert_tensor_parallel_size: int | None = _option(
        PARALLEL,
        "--expert-tensor-parallel-size",
        None,
        "Tensor-parallel ranks of an expert. [--tensor-model-parallel-size]",
        type=int,
    )
    sequence_parallel: bool = _option(
        PARALLEL, "--sequence-parallel", False, "Sequence parallelism (SP) beside TP."
    )
    use_distributed_optimizer: bool = _option(
        PARALLEL,
        "--use-distributed-optimizer",
        False,
        "Shard optimizer states over data-parallel ranks.",
    )
    overlap_grad_reduce: bool = _option(
        PARALLEL, "--overlap-grad-reduce", False, "Reduce gradients while backwards run."
    )
    overlap_param_gather: bool = _option(
        PARALLEL, "--overlap-param-gather", False, "Gather parameters while forwards run."
    )

    # batch
    micro_batch_size: int | None = _option(
        BATCH, "--micro-batch-size", None, "Sequences of a micro-batch. [1]", type=int
    )
    global_batch_size: int | None = _option(
        BATCH, "--global-batch-size", None, "Sequences of a step on all ranks.", type=int
    )

    # precision, optimizer, recomputation
    bf16: bool = _option(MEMORY, "--bf16", False, "Train in bf16. [unless --fp16 or --fp32]")
    fp16: bool = _option(MEMORY, "--fp16", False, "Train in fp16.")
    accumulate_allreduce_grads_in_fp32: bool = _option(
        MEMORY, "--accumulate-allreduce-grads-in-fp32", False, "Gradients in fp32 (bf16 has it)."
    )
    grad_reduce_in_bf16: bool = _option(MEMORY, "--grad-reduce-in-bf16", False, "bf16 gradients.")
    optimizer: str = _option(
        MEMORY,
        "--optimizer",
        "adam",
        "Optimizer.",
        type=str,
        choices=("adam", "sgd", "muon", "dist_muon", "lion", "soap", "adaptive_muon"),
    )
    use_precision_aware_optimizer: bool = _option(
        MEMORY, "--use-precision-aware-optimizer", False, "Optimizer states in given precisions."
    )
    main_grads_dtype: str = _option(
        MEMORY,
        "--main-grads-dtype",
        "fp32",
        "Precision of the optimizer's gradients.",
        type=str,
        choices=("fp32", "bf16"),
    )
    main_params_dtype: str = _option(
        MEMORY,
        "--main-params-dtype",
        "fp32",
        "Precision of the optimizer's parameters.",
        type=str,
        choices=("fp32", "fp16"),
    )
    exp_avg_dtype: str = _option(
        MEMORY,
        "--exp-avg-dtype",
        "fp32",
        "Precision of first moments.",
        type=str,
        choices=("fp32", "fp16", "bf16", "fp8"),
    )
    exp_avg_sq_dtype: str = _option(
        MEMORY,
        "--exp-avg-sq-dtype",
        "fp32",
        "Precision of second moments.",
        type=str,
        choices=("fp32", "fp16", "bf16", "fp8"),
    )
    recompute_granularity: str | None = _option(
        MEMORY,
        "--recompute-granularity",
        None,
        "Recompute whole layers (full) or modules (selective).",
        type=str,
        choices=("full", "selective"),
    )
    recompute_activations: bool = _option(
        MEMORY, "--recompute-activations", False, "Same as --recompute-granularity selective."
    )
    recompute_method: str | None = _option(
        MEMORY,
        "--recompute-method",
        None,
        "full: every layer in groups (uniform), or the first N of a chunk (block).",
        type=str,
        choices=("uniform", "block"),
    )
    recompute_num_layers: int | None = _option(
        MEMORY,
        "--recompute-num-layers",
        None,
        "full: layers of a group (uniform) or of a chunk (block).",
        type=int,
    )
    recompute_modules: tuple[str, ...] | None = _option(
        MEMORY,
        "--recompute-modules",
        None,
        f"selective: which of {', '.join(RECOMPUTE_MODULES)}. [core_attn]",
        type=str,
        choices=RECOMPUTE_MODULES,
        many=True,
    )

    # kernels
    transformer_impl: str = _option(
        KERNELS,
        "--transformer-impl",
        "transformer_engine",
        "Whose layers: Transformer Engine's or Megatron's own.",
        type=str,
        choices=("local", "transformer_engine", "inference_optimized"),
    )
    apply_rope_fusion: bool = _option(
        KERNELS, "--no-rope-fusion", True, "Rotary embedding by separate operations."
    )
    bias_swiglu_fusion: bool = _option(
        KERNELS, "--no-bias-swiglu-fusion", True, "SwiGLU by separate operations."
    )
    bias_gelu_fusion: bool = _option(
        KERNELS, "--no-bias-gelu-fusion", True, "GELU and bias by separate operations."
    )

    # sub-sequences
    seq1f1b_splits: int | str | None = _option(
        SUB_SEQUENCES,
        "--seq1f1b-splits --splits",
        None,
        "Sub-sequences of a micro-batch.",
        type=int,
    )
    seq1f1b_balance_method: str = _option(
        SUB_SEQUENCES,
        "--seq1f1b-balance-method --balance-method",
        "uniform_comp",
        "Where to cut a sequence.",
        type=str,
        choices=("average", "uniform_comp"),
    )
    seq1f1b_multiple: int = _option(
        SUB_SEQUENCES,
        "--seq1f1b-multiple --multiple",
        1,
        "Round sub-sequence lengths to multiples of N tokens.",
        type=int,
    )
    seq1f1b_lengths: tuple[int, ...] | None = _option(
        SUB_SEQUENCES,
        "--seq1f1b-lengths",
        None,
        "Lengths of the sub-sequences, instead of a number and a balance method.",
        type=int,
        many=True,
    )
    enable_seq1f1b: bool = _option(
        SUB_SEQUENCES, "--enable-seq1f1b", False, "Same as --seq1f1b-splits 4."
    )
    seq1f1b_schedule: str = _option(
        SUB_SEQUENCES,
        "--seq1f1b-schedule",
        "auto",
        "Schedule of a training run.",
        type=str,
        choices=("auto", "1f1b", "zb-h1", "greedy"),
    )
    seq1f1b_max_live: int | None = _option(
        SUB_SEQUENCES,
        "--seq1f1b-max-live --max-live",
        None,
        "greedy: sub-sequences that a stage may hold from forward to weight gradient.",
        type=int,
    )
    seq1f1b_recompute_loss: bool = _option(
        SUB_SEQUENCES,
        "--seq1f1b-recompute-loss --recompute-loss",
        False,
        "Compute the output layer and the loss anew in the backward.",
    )


@cache
def options() -> tuple[Option, ...]:
    """Return the table, a row for each field of ``Arguments``."""
    rows = []
    for entry in fields(Arguments):
        flags, kind, choices, many, panel, help_text = entry.metadata["option"]
        rows.append(Option(entry.name, flags, kind, entry.default, choices, many, panel, help_text))
    return tuple(rows)
