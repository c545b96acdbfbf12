"""Memory of long rows on ranks that share them: whole rows, windows, and sub-sequences.

    python benchmarks/ulysses.py [CASE ...] --output benchmarks/results/ulysses

Every case starts fresh processes on the CPU, joined over gloo, and takes one forward and backward
pass in float32. Memory is the resident set's peak during it over what a process held before, after
a short pass that warms up; the kernel's own counter, set back in between (Linux only). glibc keeps
freed blocks, on long rows several times of what is in use; with --give-back it returns them at
once, which takes time. Ratios compare cases of one run. Times are of this machine, where ranks
share cores.

The stored results of the two long cases, ulysses_full and ulysses_long, are of such a run each:

    python benchmarks/ulysses.py "131,072 tokens, full attention" --give-back \\
        --output benchmarks/results/ulysses_full
"""

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from report import setting, show, table
from transformers import AutoConfig, AutoModelForCausalLM

from seq1f1b.ulysses import (
    backward_in_subsequences,
    dispatch_modules,
    init_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    split_for_sequence_parallel,
)
from seq1f1b.ulysses.ranks import run_ranks

VOCABULARY = 1024
_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2**21,
}
_LEAN = {"loss_tile": 1024, "mlp_tile": 4096}


@dataclass(frozen=True)
class Case:
    """One step. bar: the GiB a rank that it must stay below, where the project promises some."""

    tokens: int
    ranks: int
    layers: int = 2
    model_type: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=lambda: dict(_LEAN))
    recompute: bool = False
    subsequences: int = 1
    bar: float | None = None


# Wide enough for a row's tensors to outweigh what does not depend on ranks, and with tiles that
# divide every shard: an MLP of one tile is not computed anew.
_SHARE = Case(
    8192,
    1,
    layers=6,
    settings={"hidden_size": 256, "intermediate_size": 688, "head_dim": 64},
    options={"loss_tile": 512, "mlp_tile": 512},
)
CASES = {
    "8192 tokens, 1 rank": _SHARE,
    "8192 tokens, 2 ranks": replace(_SHARE, ranks=2),
    "8192 tokens, 4 ranks": replace(_SHARE, ranks=4),
    "8192 tokens, 1 rank, logits and MLPs whole": replace(_SHARE, options={}),
    "8192 tokens, 1 rank, recomputation": replace(_SHARE, recompute=True),
    "8192 tokens, 1 rank, 4 sub-sequences": replace(_SHARE, subsequences=4),
    "8192 tokens, 1 rank, 16 sub-sequences": replace(_SHARE, subsequences=16),
    "8192 tokens, 2 ranks, 16 sub-sequences": replace(_SHARE, ranks=2, subsequences=16),
    "131,072 tokens, full attention": Case(
        131_072,
        2,
        settings={"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
        recompute=True,
        bar=1.0,
    ),
    "1,048,576 tokens, window of 512": Case(
        1_048_576,
        2,
        model_type="mistral",
        settings={"sliding_window": 512},
        recompute=True,
        bar=3.0,
    ),
}
_REFERENCE = "8192 tokens, 1 rank"


def measure(case: Case) -> dict[str, float]:
    """Run on every rank; return the largest growth in MiB, seconds, and the loss."""
    torch.set_num_threads(1)
    init_sequence_parallel(case.ranks)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        case.model_type, **{**_MODEL, "num_hidden_layers": case.layers, **case.settings}
    )
    model = dispatch_modules(AutoModelForCausalLM.from_config(config).train(), **case.options)
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step(model, 1024 * case.ranks, case.subsequences)
    torch.distributed.barrier()
    before = _reset_peak()
    start = time.monotonic()
    loss = step(model, case.tokens, case.subsequences)
    seconds = time.monotonic() - start
    grown = torch.tensor(_status("VmHWM") - before, dtype=torch.float64)
    torch.distributed.all_reduce(grown, op=torch.distributed.ReduceOp.MAX)
    return {"mib": float(grown) / 2**10, "seconds": seconds, "loss": loss}


def step(model: Any, tokens: int, subsequences: int) -> float:
    """Do a forward and a backward pass of one row, and return the mean loss."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (1, tokens), generator=random)
    if subsequences > 1:
        return float(backward_in_subsequences(model, ids, ids, subsequences=subsequences))
    rows = pad_for_sequence_parallel(ids, ids, torch.arange(tokens)[None], None)
    shard, labels, positions = split_for_sequence_parallel(*rows[:3])
    output = model(input_ids=shard, labels=labels, position_ids=positions, attention_mask=rows[3])
    loss = reduce_sequence_parallel_loss(output.loss, (labels != -100).sum())
    loss.backward()
    return float(loss.detach())


def _reset_peak() -> int:
    """Set the resident set's peak back to its size, and return that in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def main() -> None:
    """Run the cases and store the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--give-back", action="store_true", help="return freed blocks at once")
    parser.add_argument("--output", type=Path, help="where .json and .md go, without a suffix")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are: {'; '.join(CASES)}")
    if arguments.give_back:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)  # of the processes that are started
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.cases or CASES:
        case = CASES[name]
        figures = run_ranks(measure, case.ranks, case)
        rows[name] = {"ranks": case.ranks, "bar_gib": case.bar, **figures}
        print(name, rows[name], flush=True)
    reference = rows.get(_REFERENCE)
    with_bars = any(row["bar_gib"] for row in rows.values())
    lines = []
    for name, row in rows.items():
        comparable = reference and CASES[name].tokens == _SHARE.tokens
        share = f"{row['mib'] / reference['mib']:.3f}" if comparable else "-"
        cells = [name, row["ranks"], f"{row['mib']:.0f}", share, f"{row['seconds']:.0f}"]
        if with_bars:
            cells.append(f"{row['bar_gib'] * 1024:.0f}" if row["bar_gib"] else "none")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    names = "| Step | Ranks | MiB a rank | of one rank's | Seconds |"
    header = f"{names}{' promised: at most MiB |' if with_bars else ''}\n|---{'|--:' * 4}|"
    header += "--:|" if with_bars else ""
    about = setting(
        model="width 64, 4 heads of 16, 2 layers (8192 tokens: width 256, 4 heads of 64, 6 "
        "layers; 131,072: width 32, 2 heads), float32",
        give_back=arguments.give_back,
        transformers=transformers.__version__,
    )
    show(table(about, header, lines), arguments.output, about, rows)


if __name__ == "__main__":
    main()
