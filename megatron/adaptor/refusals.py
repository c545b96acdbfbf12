"""Which of Megatron's flags cannot go with sub-sequences, and what to do about each."""

import argparse
from collections.abc import Callable

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron.adaptor.documents import Packing


def unsupported(args: argparse.Namespace, packing: Packing | None) -> list[str]:
    """Return a line for every flag that the executor does not support, with what to do."""
    faults = [(flag, advice) for is_set, flag, advice in _UNSUPPORTED if is_set(args)]
    if packing is not None:
        named = {flag for flag, _ in faults}
        advice = f"cannot go with {packing.flag}: leave one of them out"
        faults += [
            (flag, advice)
            for is_set, flag in _UNSUPPORTED_PACKED
            if is_set(args) and flag not in named
        ]
    return [f"{flag} {advice}" for flag, advice in faults]


_ROUTINGS = frozenset({"aux_loss", "seq_aux_loss", "none"})


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _num_key_heads(args: argparse.Namespace) -> int:
    has_groups = args.group_query_attention and not args.multi_latent_attention
    return args.num_query_groups if has_groups else args.num_attention_heads


def _num_head_shares(args: argparse.Namespace) -> int:
    """Return among how many ranks context parallelism deals heads out; 1 without it."""
    cp = args.context_parallel_size
    return args.tensor_model_parallel_size * cp if cp > 1 else 1


def _truthy(name: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: bool(getattr(args, name, None))


_REMOVE = "is not supported with sub-sequences: leave it out, or use --seq1f1b-splits 1"
_RECURRENT = (
    "is not supported with sub-sequences, which carry keys and values but no recurrent state: "
    "leave it out, or use --seq1f1b-splits 1"
)
_OFFLOAD = (
    "cannot tell sub-sequences apart: recompute instead (--recompute-granularity), take more "
    "splits, or use --seq1f1b-splits 1"
)
_LAST_STAGE = (
    "must put multi-token prediction (m) into the last stage, with the loss (L), when there are "
    "sub-sequences"
)


def _predicts_ahead_of_the_last_stage(args: argparse.Namespace) -> bool:
    """Whether a layout hands the hidden states of several predictions to a later stage."""
    layout = args.pipeline_model_parallel_layout
    if not args.mtp_num_layers or layout is None:
        return False
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return layout.validate_layer_layout(args.num_layers, args.mtp_num_layers)


_UNSUPPORTED: tuple[tuple[Callable[[argparse.Namespace], bool], str, str], ...] = (
    (
        lambda args: args.attention_dropout > 0,
        "--attention-dropout",
        "must be 0 with sub-sequences (Megatron's default is 0.1): add --attention-dropout 0",
    ),
    (
        lambda args: args.context_parallel_size > 1 and set(_listed(args.cp_comm_type)) != {"a2a"},
        "--cp-comm-type",
        "must be a2a with sub-sequences, which gives each rank whole sub-sequences of its own "
        "heads: add --cp-comm-type a2a",
    ),
    (
        lambda args: _num_key_heads(args) % _num_head_shares(args) > 0,
        "--context-parallel-size",
        "times --tensor-model-parallel-size must divide the heads of keys and values "
        "(--num-query-groups, or --num-attention-heads) with sub-sequences",
    ),
    (_truthy("hybrid_context_parallel"), "--hybrid-context-parallel", _REMOVE),
    (
        lambda args: args.context_parallel_size > 1 and bool(args.mtp_num_layers),
        "--mtp-num-layers",
        "cannot go with --context-parallel-size and sub-sequences: leave one of them out",
    ),
    (
        lambda args: bool(args.num_experts) and args.moe_expert_capacity_factor is not None,
        "--moe-expert-capacity-factor",
        "drops other tokens of a sub-sequence than of the whole: leave it out, and none is dropped",
    ),
    (
        lambda args: (
            bool(args.num_experts)
            and not _ROUTINGS.issuperset(_listed(args.moe_router_load_balancing_type))
        ),
        "--moe-router-load-balancing-type",
        f"must be of {', '.join(sorted(_ROUTINGS))} with sub-sequences; the others balance over "
        "other tokens than one sub-sequence has",
    ),
    (
        lambda args: (
            bool(args.num_experts)
            and args.tensor_model_parallel_size > 1
            and not args.sequence_parallel
        ),
        "--num-experts",
        "trains under --tensor-model-parallel-size only with --sequence-parallel: add it",
    ),
    (
        lambda args: bool(args.mtp_num_layers) and args.mtp_use_repeated_layer,
        "--mtp-use-repeated-layer",
        _REMOVE,
    ),
    (_predicts_ahead_of_the_last_stage, "--pipeline-model-parallel-layout", _LAST_STAGE),
    (_truthy("hybrid_layer_pattern"), "--hybrid-layer-pattern", _RECURRENT),
    (_truthy("experimental_attention_variant"), "--experimental-attention-variant", _RECURRENT),
    (_truthy("qk_clip"), "--qk-clip", _REMOVE),
    (_truthy("log_max_attention_logit"), "--log-max-attention-logit", _REMOVE),
    (_truthy("cpu_offloading_num_layers"), "--cpu-offloading-num-layers", _OFFLOAD),
    (_truthy("window_size"), "--window-size", _REMOVE),
    (
        _truthy("fine_grained_activation_offloading"),
        "--fine-grained-activation-offloading",
        _OFFLOAD,
    ),
    (_truthy("overlap_moe_expert_parallel_comm"), "--overlap-moe-expert-parallel-comm", _REMOVE),
    (
        _truthy("tp_comm_overlap"),
        "--tp-comm-overlap",
        "has buffers as long as a whole micro-batch: leave it out, or use --seq1f1b-splits 1",
    ),
    (_truthy("use_megatron_fsdp"), "--use-megatron-fsdp", _REMOVE),
    (_truthy("use_torch_fsdp2"), "--use-torch-fsdp2", _REMOVE),
    (
        _truthy("num_microbatches_with_partial_activation_checkpoints"),
        "--num-microbatches-with-partial-activation-checkpoints",
        _REMOVE,
    ),
    (
        lambda args: getattr(args, "cuda_graph_impl", "none") != "none",
        "--cuda-graph-impl",
        "must be none with sub-sequences",
    ),
    (
        lambda args: getattr(args, "softmax_type", "vanilla") != "vanilla",
        "--softmax-type",
        "must be vanilla with sub-sequences",
    ),
)

_UNSUPPORTED_PACKED: tuple[tuple[Callable[[argparse.Namespace], bool], str], ...] = (
    (lambda args: args.context_parallel_size > 1, "--context-parallel-size"),
    (_truthy("mtp_num_layers"), "--mtp-num-layers"),
)
