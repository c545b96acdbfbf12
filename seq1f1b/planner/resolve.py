"""From options to a complete setting, or a list of everything that is wrong with them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from seq1f1b.planner.arguments import Arguments
from seq1f1b.planner.catalogue import ScheduleName, by_shape
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.faults import length_faults, missing, model_faults, not_positive
from seq1f1b.planner.layout import LayoutError, deal, num_chunks_of
from seq1f1b.planner.model import model_of
from seq1f1b.planner.setting import (
    DEFAULT_CHUNKS,
    DEFAULT_SPLITS,
    Recompute,
    Setting,
    runs_executor,
)
from seq1f1b.sequence import PartitionError

GPT2_VOCABULARY = 50257


def resolve(
    values: Mapping[str, Any],
    *,
    num_gpus: int | None = None,
    schedule: ScheduleName | None = None,
) -> Setting:
    """Return the setting that options describe.

    ``values`` are fields of ``Arguments``. Without ``num_gpus`` there is one data-parallel replica.
    ``schedule`` asks for one by name; it then says how many chunks and splits there are unless
    options do. Raises SettingError with every fault.
    """
    assumed: list[str] = []
    arguments = _with_defaults(values, assumed)
    faults = [*missing(arguments), *not_positive(arguments)]
    if faults:
        raise SettingError(faults)
    faults = list(model_faults(arguments))
    if faults:
        raise SettingError(faults)
    return _Resolver(arguments, num_gpus, schedule, assumed, values).setting()


def _with_defaults(values: Mapping[str, Any], assumed: list[str]) -> Arguments:
    a = replace(Arguments(), **values)
    if a.micro_batch_size is None:
        a = replace(a, micro_batch_size=1)
        assumed.append("--micro-batch-size 1")
    if "bf16" not in values and "fp16" not in values:
        a = replace(a, bf16=True)
        assumed.append("--bf16")
    if a.vocab_size is None and a.padded_vocab_size is None:
        a = replace(a, vocab_size=GPT2_VOCABULARY)
        assumed.append(f"--vocab-size {GPT2_VOCABULARY} (GPT-2's)")
    if "num_query_groups" in values and not a.group_query_attention:
        assumed.append("as many key heads as heads: no --group-query-attention")
    if a.max_position_embeddings is None:
        a = replace(a, max_position_embeddings=a.seq_length)
        assumed.append("--max-position-embeddings as --seq-length")
    if a.recompute_activations and a.recompute_granularity is None:
        a = replace(a, recompute_granularity="selective")
    return a


class _Resolver:
    """Derives the rest, collecting faults."""

    def __init__(
        self,
        arguments: Arguments,
        num_gpus: int | None,
        schedule: ScheduleName | None,
        assumed: list[str],
        values: Mapping[str, Any],
    ) -> None:
        self.a, self.num_gpus, self.name, self.assumed = arguments, num_gpus, schedule, assumed
        self.values = values
        self.model = model_of(arguments)
        self.faults: list[str] = []

    def setting(self) -> Setting:
        """Return the setting; raises SettingError."""
        a = self.a
        num_splits = self._num_splits()
        num_chunks = self._num_chunks()
        data = self._data_parallel()
        micro_batches = self._num_micro_batches(data)
        self.faults += self._rank_faults(num_splits, data)
        chunks: Any = ()
        try:
            chunks = deal(a, self.model.expert_layers, a.pipeline_model_parallel_size, num_chunks)
        except LayoutError as error:
            self.faults.append(str(error))
        name = self._schedule_name(num_chunks, num_splits, micro_batches)
        if self.faults:
            raise SettingError(self.faults)
        setting = Setting(
            arguments=a,
            model=self.model,
            tensor=a.tensor_model_parallel_size,
            context=a.context_parallel_size,
            data=data,
            experts=a.expert_model_parallel_size,
            expert_tensor=a.expert_tensor_parallel_size or a.tensor_model_parallel_size,
            sequence_parallel=a.sequence_parallel and a.tensor_model_parallel_size > 1,
            chunks=chunks,
            micro_batch_size=a.micro_batch_size or 1,
            num_micro_batches=micro_batches,
            num_splits=num_splits,
            schedule_name=name,
            recompute=_recompute(a),
            element_bytes=2 if a.bf16 or a.fp16 else 4,
            cuts=a.seq1f1b_lengths,
            assumed=tuple(self.assumed),
        )
        if setting.cuts and any(length % setting.multiple for length in setting.cuts):
            raise SettingError([f"--seq1f1b-lengths: not multiples of {setting.multiple}"])
        if setting.recompute.loss and not setting.runs_executor:
            only = "goes with --seq1f1b-splits only, or with --seq1f1b-schedule 1f1b"
            raise SettingError([f"--seq1f1b-recompute-loss: {only}"])
        try:
            assert setting.parts
        except PartitionError as error:
            raise SettingError([f"--seq1f1b-splits {num_splits}: {error}"]) from None
        return setting

    def _num_splits(self) -> int:
        given, lengths = self.a.seq1f1b_splits, self.a.seq1f1b_lengths
        if lengths is not None:
            self.faults += length_faults(self.a, lengths)
            return len(lengths)
        if given is not None:
            return int(given)
        if self.a.enable_seq1f1b:
            return DEFAULT_SPLITS
        if self.name is not None and self.name.has_splits:
            self.assumed.append(f"--seq1f1b-splits {DEFAULT_SPLITS}")
            return DEFAULT_SPLITS
        return 1

    def _num_chunks(self) -> int:
        wants = self.name is not None and self.name.has_chunks
        default = DEFAULT_CHUNKS if wants else 1
        try:
            number = num_chunks_of(self.a, self.a.pipeline_model_parallel_size, default)
        except LayoutError as error:
            self.faults.append(str(error))
            return 1
        if wants and all(
            getattr(self.a, name) is None
            for name in (
                "num_virtual_stages_per_pipeline_rank",
                "num_layers_per_virtual_pipeline_stage",
                "pipeline_model_parallel_layout",
            )
        ):
            self.assumed.append(f"--num-virtual-stages-per-pipeline-rank {number}")
        return number

    def _data_parallel(self) -> int:
        a = self.a
        replica = a.tensor_model_parallel_size * a.context_parallel_size
        whole = replica * a.pipeline_model_parallel_size
        expert_ranks = a.expert_model_parallel_size * (
            a.expert_tensor_parallel_size or a.tensor_model_parallel_size
        )
        if self.num_gpus is None:
            data = expert_ranks // math.gcd(replica, expert_ranks) if a.num_experts else 1
            self.assumed.append(f"{data * whole} GPUs, {data} data-parallel replica(s)")
            return data
        if self.num_gpus % whole:
            self.faults.append(
                f"--gpus {self.num_gpus}: not a multiple of {whole}, the ranks of one model "
                "(tensor x context x pipeline parallel)"
            )
            return 1
        return self.num_gpus // whole

    def _num_micro_batches(self, data: int) -> int:
        a = self.a
        rows = (a.micro_batch_size or 1) * data
        if a.global_batch_size is None:
            self.assumed.append(f"--global-batch-size {rows}: one micro-batch a step")
            return 1
        if a.global_batch_size % rows:
            self.faults.append(
                f"--global-batch-size {a.global_batch_size}: not a multiple of {rows}, "
                "--micro-batch-size times the data-parallel size"
            )
        return max(1, a.global_batch_size // rows)

    def _rank_faults(self, num_splits: int, data: int) -> Iterator[str]:
        a, model = self.a, self.model
        tp, cp, ep = (
            a.tensor_model_parallel_size,
            a.context_parallel_size,
            a.expert_model_parallel_size,
        )
        if model.heads % tp:
            yield f"--tensor-model-parallel-size {tp}: does not divide {model.heads} heads"
        if model.groups % tp and tp % model.groups:
            yield (
                f"--tensor-model-parallel-size {tp}: neither divides --num-query-groups "
                f"{model.groups} nor is a multiple of it"
            )
        if model.ffn % tp:
            yield f"--ffn-hidden-size {model.ffn}: not a multiple of tensor parallelism, {tp}"
        if a.sequence_parallel and tp == 1:
            self.assumed.append("no --sequence-parallel, which needs tensor parallelism")
        if cp > 1 and (a.seq_length or 0) % (2 * cp):
            yield (
                f"--seq-length {a.seq_length}: not a multiple of 2 x --context-parallel-size {cp}"
            )
        if a.sequence_parallel and (a.seq_length or 0) % (tp * cp):
            yield (
                f"--seq-length {a.seq_length}: not a multiple of {tp * cp}, the ranks that "
                "--sequence-parallel deals tokens to"
            )
        yield from self._sub_sequence_faults(num_splits, tp, cp)
        if model.experts is None:
            if ep > 1:
                yield f"--expert-model-parallel-size {ep}: needs --num-experts"
            return
        if model.experts.count % ep:
            yield (
                f"--expert-model-parallel-size {ep}: does not divide --num-experts "
                f"{model.experts.count}"
            )
        if tp > 1 and not a.sequence_parallel:
            yield "--num-experts: trains under tensor parallelism only with --sequence-parallel"
        ranks = ep * (a.expert_tensor_parallel_size or tp)
        if (tp * cp * data) % ranks:
            yield (
                f"--expert-model-parallel-size {ep}: {ranks} ranks for experts do not divide the "
                f"{tp * cp * data} ranks of a stage"
            )

    def _sub_sequence_faults(self, num_splits: int, tp: int, cp: int) -> Iterator[str]:
        """Yield what the executor, which also runs whole micro-batches in other orders, refuses."""
        if not self._runs_executor(num_splits):
            return
        if self.a.attention_dropout:
            if "attention_dropout" in self.values:
                yield (f"--attention-dropout {self.a.attention_dropout}: sub-sequences need 0")
            self.assumed.append("--attention-dropout 0, which sub-sequences need")
        if cp > 1:
            if self.a.mtp_num_layers:
                yield "--mtp-num-layers: cannot go with --context-parallel-size and sub-sequences"
            if set(self.a.cp_comm_type) != {"a2a"}:
                if "cp_comm_type" in self.values:
                    yield "--cp-comm-type: must be a2a with sub-sequences"
                self.assumed.append("--cp-comm-type a2a, which sub-sequences need")
            heads = self.model.heads if self.model.latent else self.model.groups
            if heads % (tp * cp):
                yield (
                    f"--context-parallel-size {cp}: times the tensor-parallel size does not divide "
                    f"the {heads} heads of keys and values, which sub-sequences need"
                )

    def _runs_executor(self, num_splits: int) -> bool:
        return runs_executor(self.a, num_splits, self.name or ScheduleName.PLAIN)

    def _schedule_name(self, chunks: int, splits: int, micro_batches: int) -> ScheduleName:
        """Return the schedule by name or by shape, once its shape is known to be possible."""
        a, stages = self.a, self.a.pipeline_model_parallel_size
        name = self.name or _trained_schedule(a) or by_shape(chunks, splits)
        if chunks > 1 and stages == 1:
            self.faults.append(
                f"{name}: {chunks} model chunks need --pipeline-model-parallel-size of at least 2"
            )
        elif not name.allows(chunks, splits):
            self.faults.append(
                f"--schedule {name}: cannot have {chunks} model chunk(s) a stage and {splits} "
                "sub-sequence(s) a micro-batch"
            )
        group = a.microbatch_group_size_per_vp_stage
        if group is not None and group < stages:
            self.faults.append(
                f"--microbatch-group-size-per-virtual-pipeline-stage {group}: at least {stages}, "
                "the number of stages"
            )
        elif name is ScheduleName.INTERLEAVED and not self._runs_executor(splits):
            self._check_turns(group or stages, micro_batches)
        return name

    def _check_turns(self, group: int, micro_batches: int) -> None:
        """Refuse what Megatron's own interleaved loop refuses."""
        left_over = micro_batches % group
        if micro_batches < group or 0 < left_over < self.a.pipeline_model_parallel_size:
            self.faults.append(
                f"--global-batch-size: {micro_batches} micro-batches a step; Megatron's "
                f"interleaved schedule needs a multiple of {group}, the number of stages"
            )


def _trained_schedule(a: Arguments) -> ScheduleName | None:
    """Return the schedule that --seq1f1b-schedule names, None where it goes by the shape."""
    splits = int(a.seq1f1b_splits or (DEFAULT_SPLITS if a.enable_seq1f1b else 1))
    if a.seq1f1b_schedule == "greedy":
        return ScheduleName.GREEDY
    if a.seq1f1b_schedule == "zb-h1":
        return ScheduleName.SEQ_ZERO_BUBBLE if splits > 1 else ScheduleName.ZERO_BUBBLE
    return None


def _recompute(a: Arguments) -> Recompute:
    modules = a.recompute_modules or ("core_attn",)
    return Recompute(
        granularity=a.recompute_granularity,
        method=a.recompute_method,
        num_layers=a.recompute_num_layers or 1,
        modules=frozenset(modules) if a.recompute_granularity == "selective" else frozenset(),
        loss=a.seq1f1b_recompute_loss,
    )
