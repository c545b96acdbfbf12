"""The flags of Seq1F1B: what they are, what they may be, and what they mean for a step."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron.core.fp4_utils import get_fp4_align_size
from megatron.core.fp8_utils import get_fp8_align_size

from megatron.adaptor.documents import Packing
from megatron.adaptor.refusals import unsupported
from seq1f1b.attention.kernels import KERNELS, is_available
from seq1f1b.schedule import (
    Schedule,
    ScheduleError,
    forward_only,
    interleaved,
    lower,
    validate,
    zb_h1,
)
from seq1f1b.sequence import (
    BALANCE_METHODS,
    Documents,
    LatentAttention,
    PackedCost,
    PartitionError,
    SubSequence,
    TokenCost,
    partition,
    sub_sequences,
)
from seq1f1b.simulate import Costs, greedy

MINDSPEED_SPLITS = 4
SCHEDULES = ("auto", "1f1b", "zb-h1", "greedy")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to Megatron's parser."""
    group = parser.add_argument_group(title="seq1f1b")
    group.add_argument(
        "--seq1f1b-splits",
        type=int,
        default=None,
        help="Number of sub-sequences that each micro-batch is cut into (default 1: Megatron's own "
        "schedule, untouched). More splits mean less bubble and less activation memory, as long as "
        "one sub-sequence still fills the device.",
    )
    group.add_argument(
        "--seq1f1b-balance-method",
        choices=BALANCE_METHODS,
        default="uniform_comp",
        help="Where to cut: average makes sub-sequences of equal length, uniform_comp of equal "
        "computation, since later tokens attend to more; with packed documents each micro-batch is "
        "cut by its own. (default: %(default)s)",
    )
    group.add_argument(
        "--seq1f1b-multiple",
        type=int,
        default=1,
        metavar="N",
        help="Make the length of every sub-sequence a multiple of N tokens. Kernels compute so "
        "many rows at a time, and what is left over costs a whole block. What parallelism needs "
        "is seen to without it. (default: %(default)s)",
    )
    group.add_argument(
        "--enable-seq1f1b",
        action="store_true",
        help=f"Same as --seq1f1b-splits {MINDSPEED_SPLITS} when no number of splits is given.",
    )
    group.add_argument(
        "--seq1f1b-schedule",
        choices=SCHEDULES,
        default="auto",
        help="auto runs one split in Megatron's own loop and more, or packed documents, under "
        "Seq1F1B, interleaved with virtual stages; 1f1b runs one split in its executor too; zb-h1 "
        "puts weight gradients off to fill gaps (Zero Bubble's ZB-H1 on sub-sequences); greedy "
        "orders forwards and both halves of backwards to the shortest simulated step, with virtual "
        "stages or without. (default: %(default)s)",
    )
    group.add_argument(
        "--seq1f1b-max-live",
        type=int,
        default=None,
        metavar="N",
        help="With --seq1f1b-schedule greedy: how many sub-sequences (on one model chunk each) a "
        "stage may hold from forward to weight gradient (default: what the first stage holds "
        "under Seq1F1B).",
    )
    group.add_argument(
        "--seq1f1b-attention",
        choices=sorted(KERNELS),
        default=None,
        help="Attention kernel of sub-sequences (default: the first of "
        f"{', '.join(KERNELS)} that takes the tensors).",
    )
    _add_output_arguments(group)
    return parser


def _add_output_arguments(group: Any) -> None:
    group.add_argument(
        "--seq1f1b-metrics-file",
        default=None,
        metavar="FILE",
        help="Append one JSON line per iteration: loss, time, tokens/s, TFLOP/s per device, peak "
        "activation memory and bubble ratio of each stage.",
    )
    group.add_argument(
        "--seq1f1b-trace-file",
        default=None,
        metavar="FILE",
        help="Write the start and end of every action of one iteration on all stages, for "
        "`seq1f1b timeline --trace FILE` and `seq1f1b simulate --trace FILE`.",
    )
    group.add_argument(
        "--seq1f1b-trace-iteration",
        type=int,
        default=3,
        metavar="N",
        help="Which iteration to trace; the first ones are slower. (default: %(default)s)",
    )


@dataclass(frozen=True)
class Settings:
    """Validated flags.

    kind: of schedule, one of SCHEDULES. max_live: see ``greedy``.
    multiple: what every sub-sequence length must be a multiple of.
    packing: how documents in a sequence are told apart; None when they are not.
    """

    num_splits: int
    balance_method: Any
    attention: str | None
    metrics_file: str | None
    sequence_length: int
    multiple: int
    cost: TokenCost
    kind: str = "auto"
    max_live: int | None = None
    trace_file: str | None = None
    trace_iteration: int = 0
    packing: Packing | None = None

    @property
    def runs_executor(self) -> bool:
        """Whether the executor of Seq1F1B runs the steps, and not Megatron's own loop.

        That loop does not tell middle stages of documents, so one split of them runs here too.
        """
        return self.num_splits > 1 or self.kind != "auto" or self.packing is not None

    @property
    def splits_backwards(self) -> bool:
        """Whether weight gradients are computed by actions of their own."""
        return self.kind in ("zb-h1", "greedy")

    def schedule(
        self, num_stages: int, num_chunks: int, num_micro_batches: int, *, trains: bool
    ) -> Schedule:
        """Return the validated, lowered schedule of one step.

        Raises ValueError where the kind of schedule has no such shape.
        """
        return _schedule(self, num_stages, num_chunks, num_micro_batches, trains)

    def cut(
        self, length: int, documents: Sequence[Documents] | None = None
    ) -> tuple[SubSequence, ...]:
        """Return the sub-sequences of a micro-batch of ``length`` tokens.

        ``documents`` are those of each of its rows, which the cut then takes into account.
        """
        return sub_sequences(
            partition(
                length,
                self.num_splits,
                method=self.balance_method,
                cost=PackedCost(self.cost, documents) if documents else self.cost,
                multiple=self.multiple,
            )
        )


@lru_cache(maxsize=16)
def _schedule(
    settings: Settings, num_stages: int, num_chunks: int, num_micro_batches: int, trains: bool
) -> Schedule:
    shape = num_stages, num_chunks, num_micro_batches, settings.num_splits
    if not trains:
        schedule = forward_only(*shape)
    elif settings.kind == "greedy":
        lengths = [part.length for part in settings.cut(settings.sequence_length)]
        like = interleaved(*shape)
        costs = Costs.of_tokens(like, settings.cost, lengths, flops_per_second=1.0)
        schedule = greedy(*shape, costs, max_live=settings.max_live)
    elif settings.kind == "zb-h1":
        if num_chunks > 1:
            raise ValueError(f"zb-h1 has 1 model chunk a stage, not {num_chunks}: use greedy")
        schedule = zb_h1(num_stages, num_micro_batches, settings.num_splits)
    else:
        schedule = interleaved(*shape)
    schedule = lower(schedule)
    validate(schedule)
    return schedule


def settings_from(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Read Megatron's parsed and validated arguments; return the settings and every fault."""
    num_splits = args.seq1f1b_splits
    if num_splits is None:
        num_splits = MINDSPEED_SPLITS if args.enable_seq1f1b else 1
    packing = _packing(args)
    features = unsupported(args, packing)
    asked = num_splits > 1 or args.seq1f1b_schedule != "auto"
    settings = Settings(
        num_splits=num_splits,
        balance_method=args.seq1f1b_balance_method,
        attention=args.seq1f1b_attention,
        metrics_file=args.seq1f1b_metrics_file,
        sequence_length=args.seq_length,
        multiple=_multiple(args),
        cost=_token_cost(args),
        kind=args.seq1f1b_schedule,
        max_live=args.seq1f1b_max_live,
        trace_file=args.seq1f1b_trace_file,
        trace_iteration=args.seq1f1b_trace_iteration,
        packing=packing if asked or not features else None,
    )
    faults = [*_split_faults(settings, args), *_schedule_faults(settings, args)]
    if settings.attention is not None and not is_available(settings.attention):
        faults.append(
            f"--seq1f1b-attention {settings.attention} does not find its package or a GPU that it "
            "runs on: leave it out, and one that does is taken"
        )
    if asked:
        faults += features
    return settings, faults


def refuse(faults: list[str], rank: int) -> None:
    """End the process if there are ``faults``; rank 0 says all of them."""
    if not faults:
        return
    listing = "\n".join(f"  - {fault}" for fault in faults)
    sys.exit(f"Seq1F1B cannot run with these arguments:\n{listing}" if rank == 0 else 2)


def _split_faults(settings: Settings, args: argparse.Namespace) -> list[str]:
    given = f"--seq1f1b-splits {settings.num_splits}"
    if settings.num_splits < 1:
        return [f"{given}: must be at least 1 (1 is Megatron's own schedule)"]
    if args.seq1f1b_multiple < 1:
        return [f"--seq1f1b-multiple {args.seq1f1b_multiple}: must be at least 1"]
    try:
        settings.cut(settings.sequence_length)
    except PartitionError as error:
        return [f"{given} with --seq-length {args.seq_length}: {error}{_why_multiple(args)}"]
    return []


def _multiple(args: argparse.Namespace) -> int:
    """Return what the length of a sub-sequence is a multiple of.

    Context parallelism deals it out in two pieces per rank, sequence parallelism deals a rank's
    tokens out again, and of those a product in FP8 or FP4 takes so many at a time. The user may ask
    for more.
    """
    cp = args.context_parallel_size
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    shares = cp * math.lcm(2, tp) if cp > 1 else tp
    return math.lcm(shares, cp * tp * _num_tokens_of_a_product(args), args.seq1f1b_multiple)


def _num_tokens_of_a_product(args: argparse.Namespace) -> int:
    if args.fp8:
        return get_fp8_align_size(args.fp8_recipe)
    return get_fp4_align_size(args.fp4_recipe) if args.fp4 else 1


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
    multiple = _multiple(args)
    return f" ({' and '.join(flags)} take tokens {multiple} at a time)" if flags else ""


def _schedule_faults(settings: Settings, args: argparse.Namespace) -> Iterator[str]:
    given = f"--seq1f1b-schedule {settings.kind}"
    if settings.max_live is not None and settings.kind != "greedy":
        yield f"--seq1f1b-max-live {settings.max_live} goes with --seq1f1b-schedule greedy only"
    has_biases = args.add_bias_linear or args.add_qkv_bias
    if settings.splits_backwards and args.transformer_impl != "local" and has_biases:
        yield (
            f"{given} with --transformer-impl {args.transformer_impl}: its layers put off weight "
            "gradients, but not those of biases; use --transformer-impl local, or "
            "--disable-bias-linear and no --add-qkv-bias"
        )
    if settings.splits_backwards and not args.gradient_accumulation_fusion:
        yield f"{given}: leave out --no-gradient-accumulation-fusion"
    num_chunks = args.virtual_pipeline_model_parallel_size or 1
    micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if settings.num_splits >= 1 and settings.runs_executor:
        try:
            settings.schedule(
                args.pipeline_model_parallel_size, num_chunks, micro_batches, trains=True
            )
        except (PartitionError, ScheduleError):
            return
        except ValueError as error:
            yield f"{given}: {error}"
    is_interleaved_loop = not settings.runs_executor and num_chunks > 1
    if settings.trace_file is not None and is_interleaved_loop:
        yield (
            "--seq1f1b-trace-file cannot tell the micro-batches of Megatron's own interleaved "
            "loop; add --seq1f1b-schedule 1f1b to run the same schedule in the executor"
        )


def _packing(args: argparse.Namespace) -> Packing | None:
    """Return how the data that these flags make tells documents apart."""
    for name, flag in (
        ("sft", "--sft"),
        ("dataloader_inter_document_masking", "--dataloader-inter-document-masking"),
    ):
        if getattr(args, name, False):
            return Packing(flag, "cu_seqlens")
    if not args.reset_attention_mask:
        return None
    if args.reset_position_ids:
        return Packing("--reset-attention-mask", "position_ids")
    return Packing("--reset-attention-mask", "tokens", _end_of_document)


def _end_of_document() -> int:
    from megatron.training import get_tokenizer

    return int(get_tokenizer().eod)


def _ffn_width(args: argparse.Namespace) -> int:
    """Return the width that one token goes through, over all experts that it is sent to."""
    if not args.num_experts:
        return args.ffn_hidden_size
    expert = args.moe_ffn_hidden_size or args.ffn_hidden_size
    return expert * args.moe_router_topk + (args.moe_shared_expert_intermediate_size or 0)


def _token_cost(args: argparse.Namespace) -> TokenCost:
    return TokenCost.of_transformer(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        kv_channels=args.kv_channels,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        ffn_hidden_size=_ffn_width(args),
        gated_linear_unit=args.swiglu,
        vocab_size=getattr(args, "padded_vocab_size", None) or 0,
        latent=_latent_attention(args) if args.multi_latent_attention else None,
    )


def _latent_attention(args: argparse.Namespace) -> LatentAttention:
    return LatentAttention(
        query_rank=args.q_lora_rank,
        kv_rank=args.kv_lora_rank,
        head=args.qk_head_dim,
        rotary=args.qk_pos_emb_head_dim,
        value=args.v_head_dim,
    )
