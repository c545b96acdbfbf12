"""What the flags mean for a step."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from typing import Any

from megatron.core.fp4_utils import get_fp4_align_size
from megatron.core.fp8_utils import get_fp8_align_size

from megatron.adaptor.command_line.flags import (
    MEGATRON_ATTENTION,
    MINDSPEED_SPLITS,
    SPLITTING_SCHEDULES,
)
from megatron.adaptor.command_line.model_cost import token_cost
from megatron.adaptor.step.read_ahead import Packing
from seq1f1b.schedule import (
    Schedule,
    forward_only,
    interleaved,
    lower,
    validate,
    visiting,
    zb_h1,
)
from seq1f1b.sequence import Documents, PackedCost, SubSequence, TokenCost, partition, sub_sequences
from seq1f1b.simulate import Costs, greedy


@dataclass(frozen=True)
class Settings:
    """Flags of Seq1F1B, read once.

    attention: a kernel's name, None for the best that is available. length_multiple: what every
    sub-sequence length must be a multiple of. cost: of a token of the whole model. schedule_name:
    one of SCHEDULES. given: runs in place of a generated schedule where its shape fits. max_live:
    see ``greedy``. packing: how documents in a sequence are told apart; None if each sequence is
    one. verify: whether to compare with Megatron's own loop first. recompute_loss: whether
    backwards compute the output layer and the loss anew. timeout: of an exchange between stages.
    turn: sub-sequences that go through a model chunk before the next; None for as many as
    stages, or with offloading all. offload_chunks: model chunks that the device holds at a time; 0
    if they stay there. offload_prefetch: whether they are loaded as soon as there is room.
    offload_just_in_time: whether each is updated beside computations, before its next load.
    offload_gb_per_second: the pace of their copies; None for as fast as can be. offload_roots: for
    each stage the number of the link that it shares with others. poison: whether memory that they
    leave is filled with NaN, for tests.
    """

    num_splits: int
    balance_method: Any
    sequence_length: int
    length_multiple: int
    cost: TokenCost
    attention: str | None = None
    metrics_file: str | None = None
    schedule_name: str = "auto"
    max_live: int | None = None
    trace_file: str | None = None
    trace_iteration: int = 0
    given: Schedule | None = None
    packing: Packing | None = None
    verify: bool = False
    recompute_loss: bool = False
    timeout: timedelta | None = None
    lengths: tuple[int, ...] | None = None
    turn: int | None = None
    offload_chunks: int = 0
    offload_prefetch: bool = False
    offload_just_in_time: bool = False
    offload_gb_per_second: float | None = None
    offload_roots: tuple[int, ...] | None = None
    poison: bool = False

    @property
    def runs_executor(self) -> bool:
        """Whether the executor of Seq1F1B runs the steps, and not Megatron's own loop.

        That loop does not pass documents to middle stages, so one split of them runs here too.
        """
        named = self.schedule_name != "auto" or self.given is not None
        asked = self.num_splits > 1 or self.offload_chunks > 0
        return asked or named or self.packing is not None

    @property
    def replaces_attention(self) -> bool:
        """Whether Megatron's local attention layers compute with our kernels."""
        return self.attention != MEGATRON_ATTENTION

    @property
    def kernel(self) -> str | None:
        """The attention kernel asked for by name."""
        return self.attention if self.replaces_attention else None

    @property
    def splits_backwards(self) -> bool:
        """Whether weight gradients are computed by actions of their own."""
        return self.schedule_name in SPLITTING_SCHEDULES

    def with_cost(self, cost: TokenCost) -> "Settings":
        """Return the same settings for a model of another cost."""
        return replace(self, cost=cost)

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
        if self.lengths is not None and sum(self.lengths) == length:
            return sub_sequences(self.lengths)
        return sub_sequences(
            partition(
                length,
                self.num_splits,
                method=self.balance_method,
                cost=PackedCost(self.cost, documents) if documents else self.cost,
                multiple=self.length_multiple,
            )
        )


@lru_cache(maxsize=16)
def _schedule(
    settings: Settings, num_stages: int, num_chunks: int, num_micro_batches: int, trains: bool
) -> Schedule:
    shape = num_stages, num_chunks, num_micro_batches, settings.num_splits
    turn = settings.turn
    if settings.offload_chunks and turn is None:
        turn = max(num_stages, num_micro_batches * settings.num_splits)
    given = settings.given
    if given is not None and trains and given.shape == shape:
        schedule = given
    elif not trains:
        schedule = forward_only(*shape, turn)
    elif settings.schedule_name == "greedy":
        lengths = [part.length for part in settings.cut(settings.sequence_length)]
        like = interleaved(*shape)
        costs = Costs.of_tokens(like, settings.cost, lengths, flops_per_second=1.0)
        schedule = greedy(*shape, costs, max_live=settings.max_live)
    elif settings.schedule_name == "zb-h1":
        if num_chunks > 1:
            raise ValueError(f"zb-h1 has 1 model chunk a stage, not {num_chunks}: use greedy")
        schedule = zb_h1(num_stages, num_micro_batches, settings.num_splits)
    else:
        schedule = interleaved(*shape, turn)
    schedule = lower(schedule)
    if settings.offload_chunks:
        schedule = visiting(schedule, settings.offload_chunks, prefetch=settings.offload_prefetch)
    validate(schedule)
    return schedule


def settings_of(args: argparse.Namespace) -> Settings:
    """Read Megatron's parsed and validated arguments; nothing is checked here."""
    num_splits = args.seq1f1b_splits
    if num_splits is None:
        num_splits = MINDSPEED_SPLITS if args.enable_seq1f1b else len(args.seq1f1b_lengths or [0])
    return Settings(
        num_splits=num_splits,
        balance_method=args.seq1f1b_balance_method,
        attention=args.seq1f1b_attention,
        metrics_file=args.seq1f1b_metrics_file,
        sequence_length=args.seq_length,
        length_multiple=length_multiple(args),
        cost=token_cost(args),
        schedule_name=args.seq1f1b_schedule,
        max_live=args.seq1f1b_max_live,
        trace_file=args.seq1f1b_trace_file,
        trace_iteration=args.seq1f1b_trace_iteration,
        packing=_packing(args),
        verify=args.seq1f1b_verify,
        recompute_loss=args.seq1f1b_recompute_loss,
        lengths=tuple(args.seq1f1b_lengths) if args.seq1f1b_lengths else None,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
        turn=_turn(args, num_splits),
        offload_chunks=args.offload_model_chunks,
        offload_prefetch=args.offload_prefetch,
        offload_just_in_time=args.offload_just_in_time_updates,
        offload_gb_per_second=args.offload_link_gb_per_s,
        offload_roots=args.offload_link_roots,
    )


def _turn(args: argparse.Namespace, num_splits: int) -> int | None:
    """Return the sub-sequences of a turn; Megatron's own flag counts micro-batches."""
    micro_batches = args.microbatch_group_size_per_vp_stage
    if args.seq1f1b_turn is not None or micro_batches is None:
        return args.seq1f1b_turn
    return micro_batches * num_splits


def length_multiple(args: argparse.Namespace) -> int:
    """Return the number that the length of every sub-sequence must be a multiple of.

    Context parallelism deals it out in two pieces per rank, sequence parallelism deals a rank's
    tokens out again, and a product in FP8 or FP4 computes a fixed number of those at a time. The
    user may ask for more.
    """
    cp = args.context_parallel_size
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    shares = cp * math.lcm(2, tp) if cp > 1 else tp
    return math.lcm(shares, cp * tp * _num_tokens_of_a_product(args), args.seq1f1b_multiple)


def _num_tokens_of_a_product(args: argparse.Namespace) -> int:
    if args.fp8:
        return get_fp8_align_size(args.fp8_recipe)
    return get_fp4_align_size(args.fp4_recipe) if args.fp4 else 1


def _packing(args: argparse.Namespace) -> Packing | None:
    """Return how the data that these flags make tells documents apart."""
    if packing := getattr(args, "seq1f1b_packing", None):
        return packing
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
