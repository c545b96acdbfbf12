"""The table of arguments that cannot work, each with the way out, and the one place that exits."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron.adaptor.command_line.flags import MEGATRON_ATTENTION
from megatron.adaptor.command_line.settings import Settings, length_multiple, settings_of
from megatron.adaptor.cpu import device
from seq1f1b.agreement import wait_for_first
from seq1f1b.attention.kernels import is_available
from seq1f1b.files import cannot_fill, cannot_write
from seq1f1b.schedule import ScheduleError
from seq1f1b.sequence import PartitionError

_PATIENCE = 10.0  # seconds that a rank waits for rank 0 to print why all of them end


class Arguments(NamedTuple):
    """Megatron's validated arguments, and what ours among them mean."""

    args: argparse.Namespace
    settings: Settings


Applies = Callable[[Arguments], bool]


class Scope(Enum):
    """When a refusal counts. Packed documents count where the executor runs them."""

    ALWAYS = "always"
    CUT = "with sub-sequences"
    PACKED = "with packed documents"


@dataclass(frozen=True)
class Refusal:
    """A setting that is refused.

    flag: its name, as the user gave it. advice: what is allowed and what to do, or a function that
    returns it.
    """

    flag: str
    applies: Applies
    advice: str | Callable[[Arguments], str]
    scope: Scope = Scope.CUT

    def message(self, arguments: Arguments) -> str:
        """Return the sentence that the user reads."""
        advice = self.advice if isinstance(self.advice, str) else self.advice(arguments)
        return f"{self.flag} {advice}"


def settings_from(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Read Megatron's parsed and validated arguments; return the settings and every fault."""
    settings = settings_of(args)
    asked = replace(settings, packing=None).runs_executor
    of_packed = settings.packing is not None
    found = {
        scope: [
            row for row in TABLE if row.scope is scope and row.applies(Arguments(args, settings))
        ]
        for scope in Scope
    }
    if not asked and of_packed and (found[Scope.CUT] or found[Scope.PACKED]):
        # Megatron's own loop packs documents with flags that the executor refuses.
        settings, of_packed = replace(settings, packing=None), False
    rows = found[Scope.ALWAYS] + (found[Scope.CUT] if asked else [])
    if asked and of_packed:
        named = {row.flag for row in rows}
        rows += [row for row in found[Scope.PACKED] if row.flag not in named]
    arguments = Arguments(args, settings)
    messages = [row.message(arguments) for row in rows]
    return settings, [*_own_faults(arguments), *messages]


def refuse(faults: list[str], rank: int) -> None:
    """End the process, with a message, if there are ``faults``; rank 0 may print it first."""
    if not faults:
        return
    listing = "\n".join(f"  - {fault}" for fault in faults)
    message = f"Seq1F1B cannot run with these arguments:\n{listing}"
    if rank == 0:
        sys.exit(message)
    sys.stderr.write(f"{wait_for_first(rank, _PATIENCE)}{message}\n")
    sys.exit(2)


# ------------------------------------------------------------------------ faults of our own flags


def _own_faults(arguments: Arguments) -> Iterator[str]:
    args, settings = arguments
    given = f"--seq1f1b-splits {settings.num_splits}"
    if settings.num_splits < 1:
        yield f"{given}: must be at least 1 (1 is Megatron's own schedule)"
    elif args.seq1f1b_multiple < 1:
        yield f"--seq1f1b-multiple {args.seq1f1b_multiple}: must be at least 1"
    elif faults := [*_length_faults(arguments)]:
        yield from faults
    else:
        try:
            settings.cut(settings.sequence_length)
        except PartitionError as error:
            yield f"{given} with --seq-length {args.seq_length}: {error}{_why_multiple(args)}"
        else:
            yield from _schedule_faults(arguments)
    yield from _link_faults(arguments)
    yield from _file_faults(arguments)


def _link_faults(arguments: Arguments) -> Iterator[str]:
    args, settings = arguments
    pace, roots = settings.offload_gb_per_second, settings.offload_roots
    if pace is not None and not 0.0 < pace < math.inf:
        yield f"--offload-link-gb-per-s {pace:g}: must be above 0: leave it out for no limit"
    elif pace is not None and device.has_gpu():
        yield (
            f"--offload-link-gb-per-s {pace:g}: is for rehearsals without a GPU, whose own link "
            "has a pace: leave it out"
        )
    if roots is not None and len(roots) != args.pipeline_model_parallel_size:
        yield (
            f"--offload-link-roots {','.join(map(str, roots))}: {len(roots)} numbers for "
            f"{args.pipeline_model_parallel_size} stages: give one for each stage"
        )


def _length_faults(arguments: Arguments) -> Iterator[str]:
    args, settings = arguments
    if settings.lengths is None:
        return
    given = f"--seq1f1b-lengths {' '.join(map(str, settings.lengths))}"
    if len(settings.lengths) != settings.num_splits:
        yield f"{given}: {len(settings.lengths)} lengths for {settings.num_splits} splits"
    if sum(settings.lengths) != args.seq_length:
        yield f"{given}: sum to {sum(settings.lengths)}, not to --seq-length {args.seq_length}"
    multiple = settings.length_multiple
    if any(length < 1 or length % multiple for length in settings.lengths):
        yield f"{given}: must be positive multiples of {multiple}{_why_multiple(args)}"
    if settings.packing is not None:
        yield f"{given}: packed documents are cut by their own lengths: leave it out"


def _why_multiple(args: argparse.Namespace) -> str:
    flags = [
        f"{flag} {size}"
        for flag, size, counts in (
            ("--context-parallel-size", args.context_parallel_size, True),
            (
                "--sequence-parallel with --tensor-model-parallel-size",
                args.tensor_model_parallel_size,
                args.sequence_parallel,
            ),
            ("--seq1f1b-multiple", args.seq1f1b_multiple, True),
        )
        if counts and size > 1
    ]
    flags += [
        f"{flag} {value}"
        for flag, value in (("--fp8-format", args.fp8), ("--fp4-format", args.fp4))
        if value
    ]
    multiple = length_multiple(args)
    return f" ({' and '.join(flags)} take tokens {multiple} at a time)" if flags else ""


def _schedule_faults(arguments: Arguments) -> Iterator[str]:
    """Ask for the schedule of a training step, which is made once."""
    args, settings = arguments
    num_chunks = _num_chunks(arguments)
    if not 0 <= settings.offload_chunks <= num_chunks:
        yield (
            f"--offload-model-chunks {settings.offload_chunks}: must be from 0 to the model chunks "
            f"of a stage, which are {num_chunks}: use fewer, or more "
            "--num-virtual-stages-per-pipeline-rank"
        )
        return
    if not settings.runs_executor:
        return
    if settings.offload_chunks and settings.splits_backwards:
        return  # refused by its row of the table
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    try:
        settings.schedule(args.pipeline_model_parallel_size, num_chunks, micro_batches, trains=True)
    except ScheduleError as error:
        yield f"--seq1f1b-schedule {settings.schedule_name} made a schedule that cannot run: "
        f"{error}"
    except ValueError as error:
        yield f"--seq1f1b-schedule {settings.schedule_name}: {error}"


def _file_faults(arguments: Arguments) -> Iterator[str]:
    settings = arguments.settings
    for flag, name in (
        ("--seq1f1b-metrics-file", settings.metrics_file),
        ("--seq1f1b-trace-file", settings.trace_file),
    ):
        if name is not None and (why := cannot_write(Path(name))):
            yield f"{flag} {name}: cannot be written ({why}): name another file"
    for flag in ("--save", "--data-cache-path", "--tensorboard-dir"):
        name = getattr(arguments.args, flag.removeprefix("--").replace("-", "_"), None)
        if name and "://" not in name and (why := cannot_fill(Path(name))):
            yield f"{flag} {name}: cannot be written into ({why}): name another folder"


# --------------------------------------------------------------------------------------- the table

_REMOVE = "is not supported with sub-sequences: leave it out, or use --seq1f1b-splits 1"
_RECURRENT = (
    "is not supported with sub-sequences, which carry keys and values but no recurrent state: "
    "leave it out, or use --seq1f1b-splits 1"
)
_OFFLOAD = (
    "cannot tell sub-sequences apart: recompute instead (--recompute-granularity), use more "
    "splits, or use --seq1f1b-splits 1"
)
_DROPS = "drops other tokens of a sub-sequence than of the whole: leave it out, and none is dropped"
_NOT_OFFLOADED = "cannot go with --offload-model-chunks: leave one of them out"
_NOT_OFFLOADED_HERE = "cannot go with --offload-model-chunks on a GPU: leave one of them out"
_NOT_LATE = "cannot go with --offload-just-in-time-updates: leave one of them out"
_RECORDS = (
    "records each forward of the model, which with sub-sequences is not that of a micro-batch: "
    "leave it out, or use --seq1f1b-splits 1"
)
_ROUTINGS = frozenset({"aux_loss", "seq_aux_loss", "none"})


def _set(name: str) -> Applies:
    """Whether an argument has a value that turns it on."""
    return lambda arguments: bool(getattr(arguments.args, name, None))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _is_not(name: str, default: str) -> Applies:
    return lambda arguments: getattr(arguments.args, name, default) != default


def _with_experts(name: str) -> Applies:
    return lambda arguments: (
        bool(arguments.args.num_experts) and bool(getattr(arguments.args, name, None))
    )


def _has_indivisible_heads(arguments: Arguments) -> bool:
    """Whether context parallelism cannot deal the heads of keys and values out."""
    args = arguments.args
    has_groups = args.group_query_attention and not args.multi_latent_attention
    heads = args.num_query_groups if has_groups else args.num_attention_heads
    cp = args.context_parallel_size
    return cp > 1 and heads % (args.tensor_model_parallel_size * cp) > 0


def _predicts_ahead_of_the_last_stage(arguments: Arguments) -> bool:
    """Whether a layout sends the hidden states of several predictions to a later stage."""
    args = arguments.args
    layout = args.pipeline_model_parallel_layout
    if not args.mtp_num_layers or layout is None:
        return False
    if isinstance(layout, str):
        layout = PipelineParallelLayerLayout.from_str(layout, args.pipeline_model_parallel_size)
    return layout.validate_layer_layout(args.num_layers, args.mtp_num_layers)


def _not_with_packing(arguments: Arguments) -> str:
    packing = arguments.settings.packing
    assert packing is not None
    return f"cannot go with {packing.flag}: leave one of them out"


def _offloads(name: str) -> Applies:
    """Whether model chunks visit the device and an argument has a value."""
    return lambda arguments: (
        arguments.settings.offload_chunks > 0 and bool(getattr(arguments.args, name, None))
    )


def _offloads_from_gpu(name: str) -> Applies:
    """Whether model chunks visit a GPU and an argument has a value."""
    return lambda arguments: _offloads(name)(arguments) and device.has_gpu()


def _updates_late(name: str) -> Applies:
    """Whether updates run behind the next step and an argument has a value."""
    return lambda arguments: (
        arguments.settings.offload_just_in_time and bool(getattr(arguments.args, name, None))
    )


def _num_chunks(arguments: Arguments) -> int:
    return arguments.args.virtual_pipeline_model_parallel_size or 1


def _defers_biases(arguments: Arguments) -> bool:
    args = arguments.args
    has_biases = args.add_bias_linear or args.add_qkv_bias
    return arguments.settings.splits_backwards and args.transformer_impl != "local" and has_biases


def _takes_turns(arguments: Arguments) -> bool:
    return _num_chunks(arguments) > 1 and not arguments.settings.splits_backwards


def _traces_interleaved_loop(arguments: Arguments) -> bool:
    has_chunks = _num_chunks(arguments) > 1
    settings = arguments.settings
    return settings.trace_file is not None and not settings.runs_executor and has_chunks


def _traces_beyond_the_run(arguments: Arguments) -> bool:
    last = arguments.args.train_iters
    settings = arguments.settings
    if settings.trace_file is None:
        return False
    return settings.trace_iteration < 1 or (last is not None and settings.trace_iteration > last)


TABLE: tuple[Refusal, ...] = (
    Refusal(
        "--seq1f1b-attention",
        lambda a: a.settings.kernel is not None and not is_available(a.settings.kernel),
        lambda a: (
            f"{a.settings.attention} needs a package or a GPU that is not here: leave the flag "
            "out, and the best kernel that is available is used"
        ),
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-attention",
        lambda a: (
            not a.settings.replaces_attention
            and (a.settings.num_splits > 1 or a.settings.packing is not None)
        ),
        f"{MEGATRON_ATTENTION} keeps no keys and values of earlier sub-sequences and no documents: "
        "leave it out, or use --seq1f1b-splits 1",
    ),
    Refusal(
        "--seq1f1b-max-live",
        lambda a: a.settings.max_live is not None and a.settings.schedule_name != "greedy",
        lambda a: f"{a.settings.max_live} goes with --seq1f1b-schedule greedy only",
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-turn",
        lambda a: a.args.seq1f1b_turn is not None and not a.settings.runs_executor,
        "is not of Megatron's own loop: add --seq1f1b-schedule 1f1b, or use "
        "--microbatch-group-size-per-virtual-pipeline-stage",
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-turn",
        lambda a: a.args.seq1f1b_turn is not None and not _takes_turns(a),
        "goes with virtual stages and --seq1f1b-schedule auto or 1f1b only: leave it out",
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-turn",
        lambda a: None not in (a.args.seq1f1b_turn, a.args.microbatch_group_size_per_vp_stage),
        "and --microbatch-group-size-per-virtual-pipeline-stage both say how long a turn is: leave "
        "one of them out",
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-recompute-loss",
        lambda a: a.settings.recompute_loss and not a.settings.runs_executor,
        "is not of Megatron's own loop: add --seq1f1b-schedule 1f1b, or use --seq1f1b-splits",
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-recompute-loss",
        lambda a: a.settings.recompute_loss and bool(a.args.mtp_num_layers),
        "cannot go with --mtp-num-layers, whose own logits are kept: leave it out",
    ),
    Refusal(
        "--offload-model-chunks",
        lambda a: a.settings.offload_chunks > 0 and _num_chunks(a) == 1,
        "needs several model chunks a stage: add --num-virtual-stages-per-pipeline-rank",
        Scope.ALWAYS,
    ),
    Refusal(
        "--offload-model-chunks",
        lambda a: a.settings.offload_chunks > 0 and not a.args.use_distributed_optimizer,
        "takes its host copies from flat buffers: add --use-distributed-optimizer",
        Scope.ALWAYS,
    ),
    Refusal(
        "--offload-model-chunks",
        lambda a: a.settings.offload_chunks > 0 and a.settings.splits_backwards,
        lambda a: (
            f"cannot go with --seq1f1b-schedule {a.settings.schedule_name}, which splits "
            "backwards: use auto or 1f1b"
        ),
        Scope.ALWAYS,
    ),
    Refusal(
        "--offload-prefetch",
        lambda a: a.settings.offload_prefetch and a.settings.offload_chunks == 0,
        "goes with --offload-model-chunks only",
        Scope.ALWAYS,
    ),
    Refusal(
        "--offload-just-in-time-updates",
        lambda a: a.settings.offload_just_in_time and a.settings.offload_chunks == 0,
        "goes with --offload-model-chunks only",
        Scope.ALWAYS,
    ),
    Refusal(
        "--offload-link-gb-per-s",
        lambda a: a.settings.offload_gb_per_second is not None and a.settings.offload_chunks == 0,
        "goes with --offload-model-chunks only",
        Scope.ALWAYS,
    ),
    Refusal(
        "--offload-link-roots",
        lambda a: a.settings.offload_roots is not None and a.settings.offload_gb_per_second is None,
        "goes with --offload-link-gb-per-s only",
        Scope.ALWAYS,
    ),
    Refusal(
        "--optimizer",
        lambda a: a.settings.offload_just_in_time and a.args.optimizer != "adam",
        lambda a: (
            f"{a.args.optimizer} does not update chunk by chunk: leave "
            "--offload-just-in-time-updates out, or use adam"
        ),
        Scope.ALWAYS,
    ),
    Refusal(
        "--use-precision-aware-optimizer",
        _updates_late("use_precision_aware_optimizer"),
        _NOT_LATE,
        Scope.ALWAYS,
    ),
    Refusal(
        "--optimizer-cuda-graph", _updates_late("optimizer_cuda_graph"), _NOT_LATE, Scope.ALWAYS
    ),
    Refusal(
        "--qk-clip",
        _updates_late("qk_clip"),
        f"{_NOT_LATE}: it changes weights that are not updated yet",
        Scope.ALWAYS,
    ),
    Refusal(
        "--save-params-interval",
        _updates_late("save_params_interval"),
        f"{_NOT_LATE}: it reads weights that are not updated yet",
        Scope.ALWAYS,
    ),
    Refusal(
        "--overlap-grad-reduce",
        _offloads("overlap_grad_reduce"),
        f"{_NOT_OFFLOADED}: reductions would start before a chunk's gradients are home",
        Scope.ALWAYS,
    ),
    Refusal(
        "--overlap-param-gather",
        _offloads("overlap_param_gather"),
        f"{_NOT_OFFLOADED}: weights would arrive at home after they were loaded",
        Scope.ALWAYS,
    ),
    Refusal("--seq1f1b-verify", _offloads("seq1f1b_verify"), _NOT_OFFLOADED, Scope.ALWAYS),
    Refusal(
        "--optimizer-cpu-offload",
        _offloads("optimizer_cpu_offload"),
        f"{_NOT_OFFLOADED}, which updates weights in host memory already",
        Scope.ALWAYS,
    ),
    Refusal("--fp8-param-gather", _offloads("fp8_param_gather"), _NOT_OFFLOADED, Scope.ALWAYS),
    Refusal("--fp4-param-gather", _offloads("fp4_param_gather"), _NOT_OFFLOADED, Scope.ALWAYS),
    Refusal(
        "--defer-embedding-wgrad-compute",
        _offloads("defer_embedding_wgrad_compute"),
        f"{_NOT_OFFLOADED}: it adds to gradients that have left the device",
        Scope.ALWAYS,
    ),
    Refusal(
        "--delay-wgrad-compute",
        _offloads("delay_wgrad_compute"),
        f"{_NOT_OFFLOADED}: it adds to gradients that have left the device",
        Scope.ALWAYS,
    ),
    Refusal("--nccl-ub", _offloads("nccl_ub"), _NOT_OFFLOADED, Scope.ALWAYS),
    Refusal(
        "--ddp-param-name-patterns-for-fp32-local-accumulation",
        _offloads("ddp_param_name_patterns_for_fp32_local_accumulation"),
        f"{_NOT_OFFLOADED}: its gradients are outside of the flat buffers",
        Scope.ALWAYS,
    ),
    Refusal(
        "--fp16",
        _offloads_from_gpu("fp16"),
        "cannot go with --offload-model-chunks on a GPU, where no loss is scaled: use --bf16",
        Scope.ALWAYS,
    ),
    Refusal(
        "--loss-scale",
        _offloads_from_gpu("loss_scale"),
        "cannot go with --offload-model-chunks on a GPU: leave it out, --bf16 needs none",
        Scope.ALWAYS,
    ),
    Refusal(
        "--optimizer",
        lambda a: _offloads_from_gpu("optimizer")(a) and a.args.optimizer != "adam",
        lambda a: (
            f"{a.args.optimizer} does not update model chunks in host memory beside a GPU: use "
            "adam, or leave --offload-model-chunks out"
        ),
        Scope.ALWAYS,
    ),
    *(
        Refusal(flag, _offloads_from_gpu(name), _NOT_OFFLOADED_HERE, Scope.ALWAYS)
        for flag, name in (
            ("--use-precision-aware-optimizer", "use_precision_aware_optimizer"),
            ("--optimizer-cuda-graph", "optimizer_cuda_graph"),
            ("--ddp-average-in-collective", "ddp_average_in_collective"),
            ("--async-save", "async_save"),
            ("--fp8-format", "fp8"),
            ("--fp4-format", "fp4"),
        )
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        lambda a: (
            a.settings.offload_chunks > 0
            and max(a.args.gtp_weight_remat_size, a.args.expert_gtp_weight_remat_size) > 1
        ),
        f"(and that of experts) {_NOT_OFFLOADED}",
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-schedule",
        _defers_biases,
        lambda a: (
            f"{a.settings.schedule_name} with --transformer-impl {a.args.transformer_impl}: its "
            "layers defer weight gradients, but not those of biases; use --transformer-impl local, "
            "or --disable-bias-linear and no --add-qkv-bias"
        ),
    ),
    Refusal(
        "--seq1f1b-schedule",
        lambda a: a.settings.splits_backwards and not a.args.gradient_accumulation_fusion,
        lambda a: f"{a.settings.schedule_name}: leave out --no-gradient-accumulation-fusion",
    ),
    Refusal(
        "--seq1f1b-trace-file",
        _traces_interleaved_loop,
        "cannot tell the micro-batches of Megatron's own interleaved loop; add --seq1f1b-schedule "
        "1f1b to run the same schedule in the executor",
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-trace-iteration",
        _traces_beyond_the_run,
        lambda a: (
            f"{a.settings.trace_iteration}: must be from 1 to --train-iters {a.args.train_iters}"
        ),
        Scope.ALWAYS,
    ),
    Refusal(
        "--seq1f1b-verify",
        lambda a: a.settings.verify and a.args.hidden_dropout > 0,
        "compares two runs of a micro-batch, which dropout makes differ: add --hidden-dropout 0",
    ),
    Refusal(
        "--attention-dropout",
        lambda a: a.args.attention_dropout > 0,
        "must be 0 with sub-sequences (Megatron's default is 0.1): add --attention-dropout 0",
    ),
    Refusal(
        "--cp-comm-type",
        lambda a: a.args.context_parallel_size > 1 and set(_listed(a.args.cp_comm_type)) != {"a2a"},
        "must be a2a with sub-sequences, which gives each rank whole sub-sequences of its own "
        "heads: add --cp-comm-type a2a",
    ),
    Refusal(
        "--context-parallel-size",
        _has_indivisible_heads,
        "times --tensor-model-parallel-size must divide the heads of keys and values "
        "(--num-query-groups, or --num-attention-heads) with sub-sequences",
    ),
    Refusal("--hybrid-context-parallel", _set("hybrid_context_parallel"), _REMOVE),
    Refusal(
        "--mtp-num-layers",
        lambda a: a.args.context_parallel_size > 1 and bool(a.args.mtp_num_layers),
        "cannot go with --context-parallel-size and sub-sequences: leave one of them out",
    ),
    Refusal("--moe-expert-capacity-factor", _with_experts("moe_expert_capacity_factor"), _DROPS),
    Refusal(
        "--moe-expert-rank-capacity-factor",
        _with_experts("moe_expert_rank_capacity_factor"),
        _DROPS,
    ),
    Refusal("--moe-paged-stash", _with_experts("moe_paged_stash"), _DROPS),
    Refusal(
        "--mlp-chunks-for-training",
        lambda a: bool(a.args.num_experts) and a.args.mlp_chunks_for_training > 1,
        "balances experts over each chunk of tokens, and sub-sequences have other chunks than the "
        "whole: leave it out, or use --seq1f1b-splits 1",
    ),
    Refusal("--moe-enable-routing-replay", _with_experts("moe_enable_routing_replay"), _RECORDS),
    Refusal("--moe-routing-trace-path", _set("moe_routing_trace_path"), _RECORDS),
    Refusal("--logits-save-dir", _set("logits_save_dir"), _RECORDS),
    Refusal("--logits-load-dir", _set("logits_load_dir"), _RECORDS),
    Refusal("--save-activations-interval", _set("save_activations_interval"), _RECORDS),
    Refusal("--save-dgrads-interval", _set("save_dgrads_interval"), _RECORDS),
    Refusal("--save-tokens-per-expert-interval", _set("save_tokens_per_expert_interval"), _RECORDS),
    Refusal("--perform-rl-step", _set("perform_rl_step"), _REMOVE),
    Refusal("--use-kitchen-attention", _set("use_kitchen_attention"), _REMOVE),
    Refusal(
        "--microbatch-group-size-per-virtual-pipeline-stage",
        lambda a: (
            _num_chunks(a) > 1
            and a.settings.splits_backwards
            and (a.args.microbatch_group_size_per_vp_stage or a.args.pipeline_model_parallel_size)
            != a.args.pipeline_model_parallel_size
        ),
        lambda a: (
            f"cannot go with --seq1f1b-schedule {a.settings.schedule_name}, which has no "
            "turns: leave it out"
        ),
    ),
    Refusal(
        "--moe-router-load-balancing-type",
        lambda a: (
            bool(a.args.num_experts)
            and not _ROUTINGS.issuperset(_listed(a.args.moe_router_load_balancing_type))
        ),
        f"must be of {', '.join(sorted(_ROUTINGS))} with sub-sequences; the others balance over "
        "other tokens than one sub-sequence has",
    ),
    Refusal(
        "--num-experts",
        lambda a: (
            bool(a.args.num_experts)
            and a.args.tensor_model_parallel_size > 1
            and not a.args.sequence_parallel
        ),
        "trains under --tensor-model-parallel-size only with --sequence-parallel: add it",
    ),
    Refusal(
        "--mtp-use-repeated-layer",
        lambda a: bool(a.args.mtp_num_layers) and a.args.mtp_use_repeated_layer,
        _REMOVE,
    ),
    Refusal(
        "--pipeline-model-parallel-layout",
        _predicts_ahead_of_the_last_stage,
        "must put multi-token prediction (m) into the last stage, with the loss (L), when there "
        "are sub-sequences",
    ),
    Refusal("--hybrid-layer-pattern", _set("hybrid_layer_pattern"), _RECURRENT),
    Refusal("--linear-attention-freq", _set("linear_attention_freq"), _RECURRENT),
    Refusal("--experimental-attention-variant", _set("experimental_attention_variant"), _RECURRENT),
    Refusal("--qk-clip", _set("qk_clip"), _REMOVE),
    Refusal("--log-max-attention-logit", _set("log_max_attention_logit"), _REMOVE),
    Refusal("--cpu-offloading-num-layers", _set("cpu_offloading_num_layers"), _OFFLOAD),
    Refusal("--window-size", _set("window_size"), _REMOVE),
    Refusal(
        "--fine-grained-activation-offloading", _set("fine_grained_activation_offloading"), _OFFLOAD
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm", _set("overlap_moe_expert_parallel_comm"), _REMOVE
    ),
    Refusal(
        "--tp-comm-overlap",
        _set("tp_comm_overlap"),
        "has buffers as long as a whole micro-batch: leave it out, or use --seq1f1b-splits 1",
    ),
    Refusal("--use-megatron-fsdp", _set("use_megatron_fsdp"), _REMOVE),
    Refusal("--use-torch-fsdp2", _set("use_torch_fsdp2"), _REMOVE),
    Refusal(
        "--cuda-graph-impl", _is_not("cuda_graph_impl", "none"), "must be none with sub-sequences"
    ),
    Refusal(
        "--softmax-type", _is_not("softmax_type", "vanilla"), "must be vanilla with sub-sequences"
    ),
    Refusal(
        "--context-parallel-size",
        lambda a: a.args.context_parallel_size > 1,
        _not_with_packing,
        Scope.PACKED,
    ),
    Refusal(
        "--mtp-num-layers",
        _set("mtp_num_layers"),
        _not_with_packing,
        Scope.PACKED,
    ),
)
