"""Every command that README and the guide show, run as it is written but smaller.

Each block of commands runs in bash, in a folder that looks like the repository. Programs that a
cluster has are stood in for: ``torchrun pretrain_gpt.py`` checks the flags for its number of ranks,
``sbatch`` runs its script. Scripts of ours obey DRY_RUN=1. README's first training is a real one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.offload.machines import TREE_WITH_NAMES, UNEVEN_FIVE
from tests.seq1f1b_tools.checkpoint.tiny_models import make

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODEL = (
    "--num-layers 8 --hidden-size 64 --num-attention-heads 8 --seq-length 128 "
    "--max-position-embeddings 128 --position-embedding-type rope --attention-dropout 0 "
    "--hidden-dropout 0 "
)
TRAINING = "--micro-batch-size 1 --global-batch-size 16 --lr 1e-3 --train-iters 3 "
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 256 "
QUESTION = "--model llama-13b --gpus 32 --gpu a100-80g --seq-length 16384 --global-batch-size 32 "

# What is left out on a page, and what would take long or a network. Each must still occur.
SMALLER = {
    "--bf16 --attention-dropout 0 ...": "--bf16 --attention-dropout 0 --hidden-dropout 0 "
    f"--lr 1e-3 --train-iters 3 {MOCK}",
    "your_script.py YOUR_ARGS": f"pretrain_gpt.py {MODEL}{TRAINING}{MOCK}"
    "--pipeline-model-parallel-size 8",
    "--merge-file data/codeparrot/tokenizer/merges.txt ...": "--merge-file "
    f"data/codeparrot/tokenizer/merges.txt {MODEL}{TRAINING}",
    "--seq1f1b-splits 4 ...": f"--seq1f1b-splits 4 --seq-length 32 {TRAINING}{MOCK}",
    "--offload-prefetch ...": f"--offload-prefetch {MODEL}{TRAINING}{MOCK}",
    "--seq-length 65536 ... --schedule": "--seq-length 65536 --tensor-model-parallel-size 8 "
    "--sequence-parallel --pipeline-model-parallel-size 8 --global-batch-size 16 --schedule",
    "seq1f1b plan ...": f"seq1f1b plan {QUESTION}",
    "--dataset codeparrot ": "",
    "--size-mb 1000": "--size-mb 0.3",
    "--vocab-size 8192": "--vocab-size 300 --size-mb 0.3",
    "DATASET=codeparrot ": "",
    "checkpoints/run": "checkpoints/qwen3",
    "bash tests/run.sh ": "bash tests/run.sh --version ",
}
# Commands that take minutes, a GPU or a machine of their own: the test that runs each.
ELSEWHERE = {
    "SEQ1F1B_SYSTEM_TORCH=1 bash exp.sh": "tests/tools/test_system_torch.py::"
    "test_only_what_the_python_lacks_is_installed",
    "bash tools/wheels.sh wheels": "tests/tools/test_system_torch.py::"
    "test_a_machine_without_a_network",
    "SEQ1F1B_WHEELS=wheels bash benchmarks/gpu.sh": "tests/tools/test_system_torch.py::"
    "test_a_machine_without_a_network",
    "bash examples/finetune_llama2/train.sh [fine_tune.yaml]": "tests/examples/"
    "test_finetune_llama2.py::test_train_sh_ends_with_weights_that_have_learned",
    "NPROC_PER_NODE=2 seq1f1b train llama_tiny_seq8k": "tests/ulysses/training/test_command.py::"
    "test_a_run_that_is_killed_goes_on_bit_by_bit",
    "seq1f1b ulysses check path/to/model --sp 4": "tests/ulysses/test_check.py::"
    "test_the_command_prints_every_gradient",
    "bash examples/one_node.sh": "tests/examples/test_cluster_scripts.py::"
    "test_a_dry_run_accepts_every_flag_and_prints_each_ranks_command",
    "NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash examples/many_nodes.sh": "tests/examples/"
    "test_cluster_scripts.py::test_a_dry_run_accepts_every_flag_and_prints_each_ranks_command",
    "sbatch examples/slurm.sbatch": "tests/examples/test_cluster_scripts.py::"
    "test_a_dry_run_accepts_every_flag_and_prints_each_ranks_command",
    "torchrun --nproc-per-node 2 examples/own_loop.py --splits 4": "tests/distributed/"
    "test_enable.py::test_the_example_trains_alike_with_and_without_sub_sequences",
    "seq1f1b calibrate": "tests/planner/test_calibrate.py::test_a_calibrated_machine_plans",
    "seq1f1b map-gpus": "tests/offload/test_map_gpus.py::test_this_machine_is_read_from_sysfs",
}
STAND_INS = {
    "python": 'exec {python} "$@"',
    "seq1f1b": 'exec {python} -m seq1f1b.cli "$@"',
    "torchrun": """\
shift; ranks=$1; shift
[[ $1 == -m ]] && shift 2
if [[ $1 == pretrain_gpt.py ]]; then
  exec {python} -W ignore -m megatron.adaptor --check-flags "$ranks" "$@"
fi
exec {python} -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@" """,
    "sbatch": 'exec bash "$@"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "nvidia-smi": "cat matrix.txt",
    "lspci": "cat tree_of_bridges.txt",
}


def blocks(page):
    """Return the commands of a page: a list for each block, comments and line ends taken off."""
    found = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [
        [
            re.sub(r"\s+#.*", "", line).strip()
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()
            if line.strip()
        ]
        for block in found
    ]


def is_only_flags(commands):
    return all(command.startswith("--") for command in commands)


def all_blocks():
    for page in PAGES:
        if page.name == "planner.template.md":
            continue
        for number, commands in enumerate(blocks(page)):
            if not is_only_flags(commands):
                yield pytest.param(commands, id=f"{page.stem}-{number + 1}")


def smaller(command):
    for text, stands_for in SMALLER.items():
        command = f"{command} ".replace(text, stands_for).rstrip()
    return command


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A folder with links to what the repository has, and the stand-ins on PATH."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("pretrain_gpt.py", "exp.sh", "tools", "tests", "examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    (folder / "bin").mkdir()
    for name, program in STAND_INS.items():
        file = folder / "bin" / name
        file.write_text("#!/usr/bin/env bash\n" + program.format(python=sys.executable) + "\n")
        file.chmod(0o755)
    (folder / "matrix.txt").write_text(UNEVEN_FIVE)
    (folder / "tree_of_bridges.txt").write_text(TREE_WITH_NAMES)
    make("qwen3", folder / "Qwen3-8B", num_hidden_layers=8)
    make("llama", folder / "path" / "to" / "model")
    return folder


@pytest.mark.parametrize("commands", all_blocks())
def test_the_commands_of_a_block_work(repository, commands):
    commands = [smaller(command) for command in commands if command not in ELSEWHERE]
    assert not [command for command in commands if "..." in command]
    if not commands:
        return
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=repository,
        env=os.environ
        | {
            "PATH": f"{repository / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SEQ1F1B_VENV": str(Path(sys.executable).parents[1]),
            "DRY_RUN": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, f"{commands}\n{run.stdout[-1500:]}\n{run.stderr[-3000:]}"
    if any("--train-iters 3 --eval-iters 0" in command for command in commands):
        assert "iteration        3/       3" in run.stdout


def test_both_readmes_show_the_same_commands():
    assert blocks(ROOT / "README.md") == blocks(ROOT / "README_zh.md")


def test_what_is_made_smaller_or_run_elsewhere_is_still_there():
    commands = [command for page in PAGES for block in blocks(page) for command in block]
    for text in SMALLER:
        assert any(text in f"{command} " for command in commands), text
    for command, test in ELSEWHERE.items():
        file, _, name = test.partition("::")
        assert command in commands, command
        assert f"def {name}(" in (ROOT / file).read_text(), test
