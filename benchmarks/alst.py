"""Sequence parallelism of ours and of DeepSpeed's ALST, each against one process.

    pip install --no-build-isolation "deepspeed>=0.19"
    python benchmarks/alst.py [MODEL ...] --output benchmarks/results/alst

Small models of transformers with random weights, all kinds of their layers, on two CPU ranks. Of a
plain, a packed and a padded row: the relative error of the loss, and the largest of a gradient.
Packed rows are compared with their documents alone. ALST gets what its own loader would hand out,
and its losses are averaged by the count of targets, as its guide does. The last row is training:
three steps of AdamW with clipped gradients, FSDP2 with ours against ZeRO-3 with ALST.
"""

import argparse
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from report import setting, show, table
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from torch.nn import functional
from transformers import AutoConfig

from seq1f1b.ulysses import (
    dispatch_modules,
    init_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    split_for_sequence_parallel,
)
from seq1f1b.ulysses.check.batches import Batch, make_batch
from seq1f1b.ulysses.check.compare import gradient_errors, one_process
from seq1f1b.ulysses.check.run import check
from seq1f1b.ulysses.check.source import Source, scales_by_length
from seq1f1b.ulysses.labels import IGNORED, shift_labels, unmark
from seq1f1b.ulysses.prepare import vocabulary_of
from seq1f1b.ulysses.ranks import run_ranks
from seq1f1b.ulysses.training.deepspeed_engine import load_deepspeed

RANKS, LENGTH = 2, 48
STEPS, RATE, CLIP = 3, 1e-3, 1.0
LAYOUTS = ("plain", "packed", "padded")
_ROPE = {"rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "gemma3, windows": ("gemma3_text", {}),
    "olmo3, windows": ("olmo3", {}),
    "llama, dynamic RoPE": (
        "llama",
        {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0}},
    ),
    "qwen3_next, delta rule": ("qwen3_next", {}),
    # ALST asks every config for num_key_value_heads, and both for heads that ranks divide.
    "falcon, own attention call": (
        "falcon",
        {"hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 64},
    ),
    "llama, 3 heads": (
        "llama",
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "vocab_size": 128,
        },
    ),
    "deepseek_v3, MLA": ("deepseek_v3", {}),
    "llama4, chunks": ("llama4_text", {"num_attention_heads": 32}),
    "gpt_oss, sinks": ("gpt_oss", {}),
}
Errors = dict[str, tuple[float, float] | str]
"""Of loss and gradients by layout, or why there are none."""


def ours(folder: str) -> Errors:
    """Return the errors of a dispatched model."""
    results = check(Source(folder), RANKS, layouts=LAYOUTS, num_rows=1, length=LENGTH)
    return {result.layout: (result.loss_error, result.worst[1]) for result in results}


def theirs(folder: str, layout: str) -> tuple[float, float]:
    """Run on every rank: return ALST's errors of one layout."""
    transformers.logging.set_verbosity_error()
    source = Source(folder)
    model = source.build()
    batch = make_batch(layout, vocabulary_of(model), num_rows=1, length=LENGTH)
    wanted = one_process(model, batch, packed_as_one_row=scales_by_length(model.config))
    loss, gradients = alst(source.build().train(), batch)
    errors = gradient_errors(gradients, wanted[1])
    return abs(loss - wanted[0]) / abs(wanted[0]), max(errors.values())


def alst(model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of ALST's attention over all ranks."""
    put_alst_into(model)
    loss = loss_of_alst(model, batch)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        gradients[name] = gradient / RANKS
    return float(loss.detach()), gradients


def put_alst_into(model: Any) -> Any:
    """Let ALST's attention replace transformers'; returns its process groups."""
    deepspeed = load_deepspeed()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed("gloo", dist_init_required=False)
    return UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", sequence_parallel_size=RANKS, micro_batch_size=1
    )


def loss_of_alst(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean over the targets of all ranks, as ALST's guide takes it."""
    targets = unmark(shift_labels(batch.labels, batch.position_ids))
    own = slice(dist.get_rank() * LENGTH // RANKS, (dist.get_rank() + 1) * LENGTH // RANKS)
    output = model(
        input_ids=batch.input_ids[:, own], position_ids=batch.position_ids[:, own], use_cache=False
    )
    loss = functional.cross_entropy(
        output.logits.flatten(0, 1),
        targets[:, own].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return sum(all_gather(loss)) / (targets != IGNORED).sum()


def steps_of_alst(folder: str) -> list[float]:
    """Run on every rank: return the losses of ZeRO-3 with ALST."""
    transformers.logging.set_verbosity_error()
    deepspeed = load_deepspeed()
    model = Source(folder).build().train()
    groups = put_alst_into(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "sequence_parallel_size": RANKS,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3},
        "steps_per_print": sys.maxsize,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=groups, dist_init_required=False
    )
    losses = []
    for batch in batches_of_training(model):
        loss = loss_of_alst(engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def steps_of_ours(folder: str) -> list[float]:
    """Run on every rank: return the losses of FSDP2 with ours."""
    transformers.logging.set_verbosity_error()
    init_sequence_parallel(RANKS)
    model = dispatch_modules(Source(folder).build().train())
    for module in (*model.model.layers, model):
        fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for batch in batches_of_training(model):
        rows = pad_for_sequence_parallel(batch.input_ids, batch.labels, batch.position_ids, None)
        ids, labels, positions = split_for_sequence_parallel(*rows[:3])
        output = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False)
        loss = reduce_sequence_parallel_loss(output.loss, (labels != IGNORED).sum())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def batches_of_training(model: Any) -> list[Batch]:
    """Return a plain row for each step."""
    vocabulary = vocabulary_of(model)
    return [
        make_batch("plain", vocabulary, num_rows=1, length=LENGTH, seed=seed)
        for seed in range(STEPS)
    ]


def row_of(name: str, folder: str) -> dict[str, Errors]:
    """Return both systems' errors of a model."""
    model_type, settings = MODELS[name]
    AutoConfig.for_model(model_type, **settings).save_pretrained(folder)
    found: dict[str, Errors] = {"ours": ours(folder), "alst": {}}
    for layout in LAYOUTS:
        try:
            found["alst"][layout] = run_ranks(theirs, RANKS, folder, layout)
        except Exception as error:
            found["alst"][layout] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return found


def cell(errors: tuple[float, float] | str) -> str:
    """Return loss and gradient error as a table shows them."""
    if isinstance(errors, str):
        return "error"
    return " / ".join("exact" if error < 2e-5 else f"{error:.1%}" for error in errors)


def main() -> None:
    """Run the models and store the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of: {'; '.join(MODELS)}")
    parser.add_argument("--output", type=Path, help="where .json and .md go, without a suffix")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.models if name not in MODELS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are: {'; '.join(MODELS)}")
    rows: dict[str, dict[str, Errors]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(arguments.models or MODELS):
            rows[name] = row_of(name, f"{folder}/{number}")
            print(name, rows[name], flush=True)
        AutoConfig.for_model("llama").save_pretrained(folder)
        losses = {
            "FSDP2 with ours": run_ranks(steps_of_ours, RANKS, folder),
            "ZeRO-3 with ALST": run_ranks(steps_of_alst, RANKS, folder),
        }
    columns = [(system, layout) for system in ("ours", "alst") for layout in LAYOUTS]
    lines = [
        f"| {name} | {' | '.join(cell(row[system][layout]) for system, layout in columns)} |"
        for name, row in rows.items()
    ]
    header = "| model | " + " | ".join(f"{system}, {layout}" for system, layout in columns)
    header += " |\n|" + "---|" * (1 + len(columns))
    about = setting(
        ranks=RANKS, transformers=transformers.__version__, deepspeed=metadata.version("deepspeed")
    )
    lines += ["", *(f"{name}, losses: {numbers}" for name, numbers in losses.items())]
    show(table(about, header, lines), arguments.output, about, {**rows, "training": losses})


if __name__ == "__main__":
    main()
