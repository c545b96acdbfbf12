"""The command line of one run."""

import shlex
import sys
from pathlib import Path

from seq1f1b_tools.sweep.cluster import Cluster
from seq1f1b_tools.sweep.corpus import Corpus
from seq1f1b_tools.sweep.plan import Run
from seq1f1b_tools.sweep.settings import ROOT, Settings

TRAINING_SCRIPT = ROOT / "pretrain_gpt.py"
PINNING_SCRIPT = Path(__file__).with_name("pinned.py")
TURNS_SCRIPT = Path(__file__).with_name("take_turns.py")
_NO_ITERATION = 10**9


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
    if run.num_chunks > 1:
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


def launcher(
    run: Run, cluster: Cluster, port: int, *, pinned: bool, takes_turns: bool
) -> list[str]:
    """Return what comes before the training script: torchrun, then what it becomes the script by.

    That is what gives each rank its cores, and what waits for a turn before each step.
    """
    address = cluster.master_addr if cluster.num_nodes > 1 else "127.0.0.1"
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(cluster.num_nodes), "--node-rank", str(cluster.node_rank)),
        *("--nproc-per-node", str(run.num_processes // cluster.num_nodes)),
        *("--master-addr", address, "--master-port", str(port)),
        *((str(PINNING_SCRIPT),) if pinned else ()),
        *((str(TURNS_SCRIPT),) if takes_turns else ()),
    ]


def identity(run: Run, script: Path, arguments: list[str], cluster: Cluster) -> str:
    """Return the command without what differs from start to start and from node to node."""
    return shlex.join([f"{run.num_processes} on {cluster.num_nodes}", str(script), *arguments])
