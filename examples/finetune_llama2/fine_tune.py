"""Fine-tune a Llama as a YAML file says: Hugging Face weights in, Hugging Face weights out.

    bash train.sh [fine_tune.yaml]

The steps are the project's own tools: seq1f1b-convert, Megatron under the adaptor, seq1f1b-convert.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from model import make_tiny, with_fewer_layers
from rows import write_rows
from settings import TINY, Settings, SettingsError, check_model, read_settings
from transformers import AutoTokenizer

from seq1f1b.ulysses.training.data import DataError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONVERT = (sys.executable, ROOT / "tools" / "checkpoint" / "convert.py")


def main() -> None:
    """Run what the file named on the command line says."""
    file = Path(sys.argv[1]).resolve()
    try:
        settings = read_settings(file)
        output = (file.parent / settings.save_dir).resolve()
        if any((output / name).exists() for name in ("huggingface", "megatron")):
            raise SettingsError(f"save_dir {output}: holds a fine-tuned model already")
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="work-", dir=output))
        try:
            fine_tune(settings, file.parent, output, work)
        finally:
            shutil.rmtree(work)
    except (SettingsError, DataError, OSError) as error:
        sys.exit(str(error))


def fine_tune(settings: Settings, folder: Path, output: Path, work: Path) -> None:
    """Train and write ``output``/huggingface and, if asked, results.json and megatron beside it."""
    if settings.model == TINY:
        source = str(make_tiny(work / "tiny"))
    else:
        local = folder / settings.model
        source = str(local) if local.is_dir() else settings.model
    config = check_model(settings, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = folder / settings.dataset
    rows = write_rows(
        str(data) if data.exists() else settings.dataset,
        tokenizer,
        settings.seq_length,
        work,
    )
    if settings.num_layers < config.num_hidden_layers:
        source = str(with_fewer_layers(source, settings.num_layers, work / "shallow"))
    megatron = work / "megatron"
    run(*CONVERT, "hf-to-megatron", "--hf", source, "--output", megatron)
    start = time.monotonic()
    metrics = work / "metrics.jsonl"
    run(*training_command(settings, rows, megatron, work / "trained", metrics), settings=settings)
    seconds = time.monotonic() - start
    run(
        *(*CONVERT, "megatron-to-hf", "--megatron", work / "trained"),
        *("--hf-config", source, "--output", output / "huggingface"),
    )
    if settings.save_results:
        write_results(output / "results.json", metrics, seconds)
    if settings.save_megatron:
        shutil.copy(megatron / "megatron_flags.txt", work / "trained")
        (work / "trained").rename(output / "megatron")
    print(f"wrote {output / 'huggingface'}")


def training_command(
    settings: Settings, rows: Path, megatron: Path, trained: Path, metrics: Path
) -> list[Any]:
    """Return the command that trains."""
    words: list[Any] = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", settings.num_gpus, "--master-port", settings.master_port),
        *(HERE / "train_rows.py", "--data-path", rows),
        *(megatron / "megatron_flags.txt").read_text().splitlines(),
        *("--load", megatron, "--finetune", "--ckpt-format", "torch_dist"),
        *("--save", trained, "--save-interval", settings.num_iterations, "--no-save-optim"),
        *("--pipeline-model-parallel-size", settings.num_gpus),
        *("--micro-batch-size", settings.batch_size // settings.num_chunks),
        *("--global-batch-size", settings.batch_size, "--seq-length", settings.seq_length),
        *("--train-iters", settings.num_iterations, "--lr", settings.learning_rate),
        *("--lr-decay-style", "constant", "--eval-iters", 0, "--log-interval", 1),
        *("--eval-interval", settings.num_iterations),
        *("--tokenizer-type", "NullTokenizer", "--sft", "--use-distributed-optimizer"),
        *("--calculate-per-token-loss", "--transformer-impl", "local"),
        *("--seq1f1b-schedule", "1f1b", "--seq1f1b-metrics-file", metrics),
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", 1),
    ]
    if settings.num_virtual > 1:
        words += ["--num-virtual-stages-per-pipeline-rank", settings.num_virtual]
    if settings.use_offload:
        words += ["--offload-model-chunks", max(1, settings.num_virtual // 2)]
    if settings.use_prefetch:
        words += ["--offload-prefetch"]
    if torch.cuda.is_available():
        words += ["--bf16"]
    return words


def run(*words: Any, settings: Settings | None = None) -> None:
    """Run a command; its failure ends this one."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if settings is not None:
        environment |= {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": settings.cuda_visible_devices,
            "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
        }
    done = subprocess.run(list(map(str, words)), env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def write_results(file: Path, metrics: Path, seconds: float) -> None:
    """Write losses, time and memory of the run."""
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    results = {
        "seconds": seconds,
        "losses": [step["lm_loss"] for step in steps],
        "milliseconds_per_step": [step["milliseconds"] for step in steps],
        "tokens_per_second": [step["tokens_per_second"] for step in steps],
        "peak_activation_bytes_by_stage": steps[-1]["peak_activation_bytes"],
        "chunk_loads_by_stage": steps[-1]["chunk_loads"],
        "transferred_bytes_by_stage": steps[-1]["transferred_bytes"],
    }
    file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
