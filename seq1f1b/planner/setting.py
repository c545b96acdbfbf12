"""One complete setting: a model, how it is spread over ranks, and how a step runs."""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from seq1f1b.planner.arguments import Arguments
from seq1f1b.planner.catalogue import ScheduleName, make
from seq1f1b.planner.layout import ChunkLayers
from seq1f1b.planner.model import Model
from seq1f1b.schedule import Schedule
from seq1f1b.sequence import SubSequence, partition, sub_sequences

DEFAULT_SPLITS = 4
DEFAULT_CHUNKS = 2


@dataclass(frozen=True)
class Recompute:
    """What a backward computes anew.

    granularity: None, full or selective. num_layers: of a group (uniform) or of a chunk (block).
    loss: whether the output layer and the loss are.
    """

    granularity: str | None = None
    method: str | None = None
    num_layers: int = 1
    modules: frozenset[str] = frozenset()
    loss: bool = False

    def is_full(self, layer: int) -> bool:
        """Whether the chunk's layer of this number is computed anew as a whole."""
        if self.granularity != "full":
            return False
        return self.method == "uniform" or layer < self.num_layers

    def has(self, module: str) -> bool:
        """Whether a module of every layer is computed anew."""
        return self.granularity == "selective" and module in self.modules


@dataclass(frozen=True)
class Setting:
    """A setting that Megatron takes.

    arguments: the options it comes of. tensor, context, data, experts, expert_tensor: ranks of each
    kind of parallelism. chunks: the layers of every model chunk of each stage. cuts: lengths of
    sub-sequences that are given instead of computed. assumed: sentences on what was not given.
    """

    arguments: Arguments
    model: Model
    tensor: int
    context: int
    data: int
    experts: int
    expert_tensor: int
    sequence_parallel: bool
    chunks: tuple[tuple[ChunkLayers, ...], ...]
    micro_batch_size: int
    num_micro_batches: int
    num_splits: int
    schedule_name: ScheduleName
    recompute: Recompute
    element_bytes: int
    cuts: tuple[int, ...] | None = None
    assumed: tuple[str, ...] = ()

    @property
    def runs_executor(self) -> bool:
        """Whether the executor of sub-sequences runs the steps, and not Megatron's own loop."""
        return runs_executor(self.arguments, self.num_splits, self.schedule_name)

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.chunks)

    @property
    def num_chunks(self) -> int:
        """Model chunks of a stage."""
        return len(self.chunks[0])

    @property
    def num_gpus(self) -> int:
        """Ranks in all."""
        return self.tensor * self.context * self.data * self.num_stages

    @property
    def seq_length(self) -> int:
        """Tokens of a sequence."""
        assert self.arguments.seq_length is not None
        return self.arguments.seq_length

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.tensor * self.context * self.data // (self.expert_tensor * self.experts)

    @property
    def vocabulary(self) -> int:
        """Size of the padded vocabulary."""
        a = self.arguments
        if a.padded_vocab_size is not None:
            return a.padded_vocab_size
        multiple = a.make_vocab_size_divisible_by * self.tensor
        return -(-self.model.vocabulary // multiple) * multiple

    @property
    def multiple(self) -> int:
        """What every sub-sequence length is a multiple of.

        Context parallelism deals a sub-sequence out in two pieces a rank, sequence parallelism
        deals a rank's tokens out again.
        """
        shards = self.tensor if self.sequence_parallel else 1
        shares = self.context * math.lcm(2, shards) if self.context > 1 else shards
        return math.lcm(shares, self.arguments.seq1f1b_multiple)

    @cached_property
    def parts(self) -> tuple[SubSequence, ...]:
        """The sub-sequences of a micro-batch; raises PartitionError where there is no such cut."""
        if self.cuts is not None:
            return sub_sequences(self.cuts)
        method: Any = self.arguments.seq1f1b_balance_method
        return sub_sequences(
            partition(
                self.seq_length,
                self.num_splits,
                method=method,
                cost=self.model.token_cost(self.vocabulary),
                multiple=self.multiple,
            )
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sub-sequence."""
        return tuple(part.length for part in self.parts)

    def tokens(self, sub_sequence: int) -> int:
        """Return the tokens of a sub-sequence on one context-parallel rank, all rows together."""
        return self.parts[sub_sequence].length * self.micro_batch_size // self.context

    def schedule(self) -> Schedule:
        """Generate the schedule of a step, in closed form; raises ValueError for a wrong shape."""
        group = self.arguments.microbatch_group_size_per_vp_stage
        return make(
            self.schedule_name,
            self.num_stages,
            self.num_chunks,
            self.num_micro_batches,
            self.num_splits,
            group * self.num_splits if group and self.num_chunks > 1 else None,
        )

    def with_micro_batches(self, number: int) -> "Setting":
        """Return the same with another number of micro-batches a step."""
        return replace(self, num_micro_batches=number)

    def with_cuts(self, cuts: tuple[int, ...]) -> "Setting":
        """Return the same with other lengths of sub-sequences."""
        return replace(self, cuts=cuts)


def runs_executor(arguments: Arguments, num_splits: int, name: ScheduleName) -> bool:
    """Whether the executor runs a schedule; asked for by name, it runs Megatron's own ones too."""
    return num_splits > 1 or arguments.seq1f1b_schedule != "auto" or not name.is_megatrons


def with_recomputed_loss(setting: Setting) -> Setting:
    """Return the setting with the output layer and the loss computed anew in the backward."""
    return replace(
        setting,
        arguments=replace(setting.arguments, seq1f1b_recompute_loss=True),
        recompute=replace(setting.recompute, loss=True),
    )


def megatron_values(setting: Setting) -> dict[str, Any]:
    """Return the setting as fields of ``Arguments`` that Megatron takes as they are.

    What was assumed is filled in, and what has no effect is left out.
    """
    values = asdict(setting.arguments)
    values["micro_batch_size"] = setting.micro_batch_size
    values["global_batch_size"] = (
        setting.micro_batch_size * setting.num_micro_batches * setting.data
    )
    values["sequence_parallel"] = setting.sequence_parallel
    values["seq1f1b_splits"] = setting.num_splits if setting.num_splits > 1 else None
    values["enable_seq1f1b"] = False
    values["seq1f1b_lengths"] = setting.cuts
    if setting.cuts is not None:
        defaults = Arguments()
        values["seq1f1b_splits"] = None
        values["seq1f1b_balance_method"] = defaults.seq1f1b_balance_method
        values["seq1f1b_multiple"] = defaults.seq1f1b_multiple
    if values["pipeline_model_parallel_layout"] is None and setting.num_chunks > 1:
        values["num_layers_per_virtual_pipeline_stage"] = None
        values["num_virtual_stages_per_pipeline_rank"] = setting.num_chunks
    if setting.runs_executor:
        values["attention_dropout"] = 0.0
        if setting.context > 1:
            values["cp_comm_type"] = ("a2a",)
    if setting.schedule_name.is_zero_bubble:
        values["seq1f1b_schedule"] = "zb-h1"
    elif setting.schedule_name == "greedy":
        values["seq1f1b_schedule"] = "greedy"
    if values["seq1f1b_schedule"] != "greedy":
        values["seq1f1b_max_live"] = None
    return values
