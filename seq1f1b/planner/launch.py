"""A setting as words of a command line, and as a script that starts it."""

import shlex
from collections.abc import Sequence
from enum import StrEnum
from textwrap import wrap

from seq1f1b.planner.command_line import write_options
from seq1f1b.planner.problem import HOST_RUNTIME, Problem
from seq1f1b.planner.setting import Setting, megatron_values

_WIDTH = 96
_THEIRS = ("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by")


class Launcher(StrEnum):
    """What starts the processes."""

    torchrun = "torchrun"
    sbatch = "sbatch"


def flags(setting: Setting) -> list[str]:
    """Return the setting as options of a Megatron script.

    The vocabulary is left out: Megatron takes it from the tokenizer.
    """
    values = megatron_values(setting)
    return write_options({name: value for name, value in values.items() if name not in _THEIRS})


def wrapped(words: Sequence[str], indent: str = "  ", width: int = _WIDTH) -> str:
    """Return words of a command line over several lines, each quoted where the shell needs it."""
    quoted = [shlex.quote(word) for word in words]
    groups: list[str] = []
    for word in quoted:
        if word.startswith("--") or not groups:
            groups.append(word)
        else:
            groups[-1] += f" {word}"
    lines = [""]
    for group in groups:
        if lines[-1] and len(lines[-1]) + len(group) + len(indent) > width - 2:
            lines.append("")
        lines[-1] += f" {group}" if lines[-1] else group
    return " \\\n".join(f"{indent}{line}" for line in lines)


def script(problem: Problem, setting: Setting, launcher: Launcher, command: str) -> str:
    """Return a script that trains a few steps on random tokens as it is, and on data if given some.

    ``command`` is the command line that made the plan, which the script names.
    """
    nodes = -(-setting.num_gpus // problem.gpus_per_node)
    per_node = min(setting.num_gpus, problem.gpus_per_node)
    about = [
        f"Made by: {command}",
        f"{setting.num_gpus} x {problem.gpu.title} on {nodes} node(s). As it is, a few steps on "
        "random tokens; for training, set DATA, TOKENIZER and ITERATIONS, and pass further "
        "options behind the script's name.",
    ]
    head = _sbatch_head(nodes, per_node) if launcher is Launcher.sbatch else _torchrun_head(nodes)
    start = _srun(per_node) if launcher is Launcher.sbatch else _torchrun(nodes, per_node)
    comments = [f"# {line}" for text in about for line in wrap(text, _WIDTH)]
    on_gpus = problem.gpu.runtime != HOST_RUNTIME
    order = ["export CUDA_DEVICE_MAX_CONNECTIONS=1"] if on_gpus and setting.tensor > 1 else []
    vocabulary = setting.model.vocabulary
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *comments,
            *head,
            "set -euo pipefail",
            "",
            "root=${ROOT:-$PWD} # where pretrain_gpt.py is",
            "iterations=${ITERATIONS:-3}",
            f"data=(--mock-data --tokenizer-type NullTokenizer --vocab-size {vocabulary} "
            "--eval-iters 0 --eval-interval 1000)",
            "if [[ -n ${DATA:-} ]]; then # the prefix of what tools/preprocess_data.py wrote",
            '  data=(--data-path "$DATA" --split 99,1,0 --tokenizer-type HuggingFaceTokenizer',
            '    --tokenizer-model "${TOKENIZER:?a folder with tokenizer.json}")',
            "fi",
            *order,
            "",
            *start,
            wrapped(flags(setting)) + " \\",
            '  --train-iters "$iterations" --lr 1e-4 --log-interval 1 "${data[@]}" "$@"',
            "",
        ]
    )


def _torchrun_head(nodes: int) -> list[str]:
    if nodes == 1:
        return []
    return ["# On every node, with NODE_RANK from 0 and MASTER_ADDR, the first node's name."]


def _torchrun(nodes: int, per_node: int) -> list[str]:
    if nodes == 1:
        return [
            f'exec torchrun --standalone --nproc-per-node {per_node} "$root/pretrain_gpt.py" \\'
        ]
    return [
        f'exec torchrun --nnodes {nodes} --node-rank "${{NODE_RANK:?}}" '
        f"--nproc-per-node {per_node} \\",
        '  --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}" \\',
        '  "$root/pretrain_gpt.py" \\',
    ]


def _sbatch_head(nodes: int, per_node: int) -> list[str]:
    return [
        "#SBATCH --job-name=seq1f1b",
        f"#SBATCH --nodes={nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --gpus-per-node={per_node}",
        "#SBATCH --exclusive",
        "#SBATCH --output=%x-%j.log",
    ]


def _srun(per_node: int) -> list[str]:
    return [
        "export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "# One launcher per node; it starts one process per GPU.",
        'srun bash -c \'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \\',
        f'  --nproc-per-node {per_node} --master-addr "$MASTER_ADDR" '
        '--master-port "$MASTER_PORT" "$@"\' launcher \\',
        '  "$root/pretrain_gpt.py" \\',
    ]
