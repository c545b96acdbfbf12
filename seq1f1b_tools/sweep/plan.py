"""The runs of a sweep, and which of them make no sense."""

import math
from dataclasses import dataclass
from itertools import product

from seq1f1b.schedule import ScheduleError, interleaved, lower, validate
from seq1f1b.sequence import PartitionError, partition
from seq1f1b.simulate.formulas import bubble_ratio, speedup_over_1f1b
from seq1f1b_tools.sweep.models import MODELS, ModelShape
from seq1f1b_tools.sweep.settings import Settings


@dataclass(frozen=True)
class Run:
    """One training run.

    balance_method: None with one split, where nothing is cut.
    multiple: of what the lengths of sub-sequences are multiples.
    num_processes: all processes of all nodes; those beyond TP x PP are data parallel.
    """

    model: ModelShape
    seq_length: int
    num_micro_batches: int
    num_splits: int
    balance_method: str | None
    multiple: int
    num_chunks: int
    tp: int
    pp: int
    micro_batch_size: int
    num_processes: int
    num_iterations: int

    @property
    def setting(self) -> str:
        """Name of everything but the schedule: runs that share it can be compared."""
        return (
            f"{self.model.name}-seq{self.seq_length}-tp{self.tp}-pp{self.pp}"
            f"-m{self.num_micro_batches}"
        )

    @property
    def schedule(self) -> str:
        """Name of the schedule."""
        kind = "1f1b" if self.num_splits == 1 else "seq1f1b"
        return kind if self.num_chunks == 1 else f"{kind}-interleaved"

    @property
    def variant(self) -> str:
        """Name of the schedule and its settings."""
        words = [self.schedule]
        if self.num_chunks > 1:
            words.append(f"v{self.num_chunks}")
        if self.balance_method is not None:
            words += [f"s{self.num_splits}", self.balance_method]
        return "-".join(words)

    @property
    def name(self) -> str:
        """Name of the run and of its files."""
        return f"{self.setting}-{self.variant}"

    @property
    def is_baseline(self) -> bool:
        """Whether this is the 1F1B that the others of its setting are compared with."""
        return self.num_splits == 1 and self.num_chunks == 1

    @property
    def global_batch_size(self) -> int:
        """Sequences of a step."""
        replicas = self.num_processes // (self.tp * self.pp)
        return self.num_micro_batches * self.micro_batch_size * replicas

    @property
    def bubble_ratio(self) -> float:
        """A stage's idle share of the step in theory."""
        return bubble_ratio(self.pp, self.num_chunks, self.num_micro_batches, self.num_splits)

    @property
    def speedup(self) -> float:
        """How much faster than 1F1B the step is in theory."""
        return speedup_over_1f1b(self.pp, self.num_chunks, self.num_micro_batches, self.num_splits)


def plan_runs(settings: Settings) -> list[Run]:
    """Return every combination of the settings, each baseline before what is compared with it."""
    return [
        Run(
            MODELS[model],
            seq_length,
            num_micro_batches,
            num_splits,
            balance_method,
            settings.multiple if num_splits > 1 else 1,
            num_chunks,
            tp,
            pp,
            settings.micro_batch_size,
            settings.cluster.world_size(tp * pp),
            settings.iterations(num_micro_batches),
        )
        for model, seq_length, tp, pp, num_micro_batches, num_chunks, num_splits in product(
            settings.model_sizes,
            settings.seq_lengths,
            settings.tp,
            settings.pp,
            settings.micro_batches,
            sorted(settings.vpp_sizes),
            sorted(settings.splits),
        )
        for balance_method in (settings.balance_methods if num_splits > 1 else (None,))
    ]


def why_not(run: Run, settings: Settings) -> str:
    """Return why ``run`` cannot work, or nothing."""
    return _no_processes(run, settings) or _no_stages(run) or _no_schedule(run, settings)


def _no_processes(run: Run, settings: Settings) -> str:
    nodes = settings.cluster.num_nodes
    if run.num_processes % (run.tp * run.pp):
        return f"TP {run.tp} x PP {run.pp} does not divide {run.num_processes} processes"
    if run.num_processes % nodes:
        return f"{run.num_processes} processes cannot be dealt to {nodes} nodes evenly"
    return ""


def _no_stages(run: Run) -> str:
    model = run.model
    if model.num_attention_heads % run.tp:
        return f"{model.num_attention_heads} attention heads are not divisible by TP {run.tp}"
    if run.num_chunks > 1 and run.pp == 1:
        return f"VPP {run.num_chunks} needs PP 2 or more"
    parts = run.pp * run.num_chunks
    if model.num_layers % parts:
        stages = f"PP {run.pp} x VPP {run.num_chunks}"
        return f"{model.num_layers} layers cannot be dealt to {stages} evenly"
    return ""


def _no_schedule(run: Run, settings: Settings) -> str:
    if run.num_splits == 1:
        if run.num_chunks > 1 and run.num_micro_batches % run.pp:
            return f"Megatron's interleaved 1F1B needs micro-batches in multiples of PP {run.pp}"
        return ""
    try:
        partition(
            run.seq_length,
            run.num_splits,
            method=run.balance_method,  # type: ignore[arg-type]
            cost=run.model.token_cost,
            multiple=math.lcm(run.tp if settings.has_gpu else 1, run.multiple),
        )
        validate(lower(interleaved(run.pp, run.num_chunks, run.num_micro_batches, run.num_splits)))
    except (PartitionError, ScheduleError) as error:
        return str(error)
    return ""
