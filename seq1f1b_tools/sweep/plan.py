"""The runs of a sweep, which of them make no sense, and the command line of each."""

import math
import shlex
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from seq1f1b.schedule import ScheduleError, interleaved, lower, validate
from seq1f1b.sequence import PartitionError, partition
from seq1f1b.simulate.formulas import bubble_ratio, speedup_over_1f1b
from seq1f1b_tools.sweep import turns
from seq1f1b_tools.sweep.corpus import Corpus
from seq1f1b_tools.sweep.models import MODELS, ModelShape
from seq1f1b_tools.sweep.nodes import Cluster
from seq1f1b_tools.sweep.settings import ROOT, Settings

TRAINING_SCRIPT = ROOT / "pretrain_gpt.py"
TYING_SCRIPT = Path(__file__).with_name("tied.py")
_NO_ITERATION = 10**9
_MOST_FORWARDS = 1_000_000


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
    if model.layers_of_parts(run.pp * run.num_chunks) is None:
        stages = f"PP {run.pp} x VPP {run.num_chunks}"
        head = f" and {model.head_layers} for the output layer" * (model.head_layers > 0)
        return f"{model.num_layers} layers{head} cannot be dealt to {stages} evenly"
    return ""


def _no_schedule(run: Run, settings: Settings) -> str:
    if run.num_splits == 1:
        if run.num_chunks > 1 and run.num_micro_batches % run.pp:
            return f"Megatron's interleaved 1F1B needs micro-batches in multiples of PP {run.pp}"
        return ""
    forwards = run.pp * run.num_chunks * run.num_micro_batches * run.num_splits
    if forwards > _MOST_FORWARDS:
        return f"{forwards:,} forwards in a step are more than {_MOST_FORWARDS:,}"
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


# -------------------------------------------------- command lines


def training_arguments(
    run: Run, corpus: Corpus, settings: Settings, metrics_file: Path
) -> list[str]:
    """Return the flags of Megatron and of Seq1F1B."""
    arguments = f"""
        --num-layers {run.model.num_layers}
        --hidden-size {run.model.hidden_size}
        --num-attention-heads {run.model.num_attention_heads}
        --seq-length {run.seq_length}
        --max-position-embeddings {run.seq_length}
        --attention-dropout 0
        --hidden-dropout 0
        --tensor-model-parallel-size {run.tp}
        --pipeline-model-parallel-size {run.pp}
        --micro-batch-size {run.micro_batch_size}
        --global-batch-size {run.global_batch_size}
        --train-iters {run.num_iterations}
        --lr 3e-4
        --lr-decay-style constant
        --weight-decay 0.1
        --clip-grad 1.0
        --seed 1234
        --split 100,0,0
        --eval-iters 0
        --eval-interval {_NO_ITERATION}
        --log-interval 1
        --no-create-attention-mask-in-dataloader
        --tokenizer-type HuggingFaceTokenizer
        --seq1f1b-splits {run.num_splits}
    """.split()
    arguments += ["--tokenizer-model", str(corpus.tokenizer), "--data-path", str(corpus.prefix)]
    arguments += ["--data-cache-path", str(corpus.cache)]
    if run.model.num_query_groups is not None:
        arguments += ["--group-query-attention"]
        arguments += ["--num-query-groups", str(run.model.num_query_groups)]
    layers = run.model.layers_of_parts(run.pp * run.num_chunks)
    if run.model.head_layers and layers is not None and run.pp > 1:
        parts = ["t" * number for number in layers]
        arguments += ["--pipeline-model-parallel-layout", f"E{'|'.join(parts)}L"]
    elif run.num_chunks > 1:
        arguments += ["--num-virtual-stages-per-pipeline-rank", str(run.num_chunks)]
    if run.balance_method is not None:
        arguments += ["--seq1f1b-balance-method", run.balance_method]
    if run.multiple > 1:
        arguments += ["--seq1f1b-multiple", str(run.multiple)]
    if settings.has_gpu:
        arguments += ["--bf16", "--use-distributed-optimizer"]
        arguments += ["--sequence-parallel"] if run.tp > 1 else []
    else:
        # A loader process would take time from the stage that shares its core, and what Megatron
        # fuses by scripts for a GPU becomes a chain of passes over memory.
        arguments += ["--num-workers", "0", "--no-bias-gelu-fusion"]
    return [*arguments, "--seq1f1b-metrics-file", str(metrics_file), *settings.extra_args]


def launcher(run: Run, settings: Settings, port: int) -> list[str]:
    """Return the words before the training script: torchrun, and what each rank runs first.

    Without GPUs each rank gets its own cores.
    """
    cluster = settings.cluster
    address = cluster.master_addr if cluster.num_nodes > 1 else "127.0.0.1"
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(cluster.num_nodes), "--node-rank", str(cluster.node_rank)),
        *("--nproc-per-node", str(run.num_processes // cluster.num_nodes)),
        *("--master-addr", address, "--master-port", str(port)),
        *(str(TYING_SCRIPT), "--worker", *(() if settings.has_gpu else ("--own-cores",))),
        *(sys.executable, "-u"),
        *((str(turns.RANK_SCRIPT),) if settings.take_turns else ()),
    ]


def identity(run: Run, script: Path, arguments: list[str], cluster: Cluster) -> str:
    """Return the command without what differs from start to start and from node to node."""
    return shlex.join([f"{run.num_processes} on {cluster.num_nodes}", str(script), *arguments])
