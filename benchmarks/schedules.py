"""Step time and memory of Megatron's 1F1B loop and of Seq1F1B, alternating, on one model.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/schedules.py

Every rank is one pipeline stage, pinned to a core of its own and to one thread. All schedules run
the same GPT on the same micro-batches in one process, in turn (A B C, B C A ...), so that a change
in the machine's speed hits all of them; medians are compared. The report says what theory allows
beside what was measured.
"""

# ruff: noqa: E402

import argparse
import datetime
import json
import os
import platform
import statistics
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

import megatron.adaptor

session = megatron.adaptor.install()

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron.adaptor.metrics import bubble_ratios
from megatron.adaptor.settings import Settings
from seq1f1b.sequence import TokenCost, imbalance
from seq1f1b.simulate.formulas import bubble_ratio, live_micro_batches, speedup_over_1f1b

MIB = 2**20


@dataclass(frozen=True)
class Contender:
    """A schedule: in Megatron's own loop (auto) or in the executor, on how many splits, cut how."""

    name: str
    kind: str = "1f1b"
    num_splits: int = 1
    balance: str = "average"


def contenders(splits: list[int]) -> list[Contender]:
    """Return Megatron's loop first, which is what all others are compared with."""
    cut = [
        Contender(f"Seq1F1B s={s} {balance}", "1f1b", s, balance)
        for s in splits
        for balance in ("average", "uniform_comp")
    ]
    return [
        Contender("Megatron 1F1B loop", "auto"),
        Contender("executor, 1 split"),
        *cut,
    ]


class Bench:
    """This rank's stage and the data of one step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        stage, last = dist.get_rank(), dist.get_world_size() - 1
        config = TransformerConfig(
            num_layers=options.layers,
            hidden_size=options.hidden_size,
            num_attention_heads=options.heads,
            pipeline_model_parallel_size=dist.get_world_size(),
            account_for_loss_in_pipeline_split=options.count_output_layer,
            pipeline_dtype=torch.float32,
            deallocate_pipeline_outputs=True,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            gradient_accumulation_fusion=True,
        )
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(),
            vocab_size=options.vocab_size,
            max_sequence_length=options.length,
            pre_process=stage == 0,
            post_process=stage == last,
            position_embedding_type="rope",
        )
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self.model.no_sync
        tokens = torch.randint(0, options.vocab_size, (1, options.length + 1))
        self.batch = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(1, options.length),
            "position_ids": torch.arange(options.length)[None],
            "attention_mask": None,
            "cu_seqlens": None,
        }
        self.cost = TokenCost.of_transformer(
            num_layers=options.layers,
            hidden_size=options.hidden_size,
            num_attention_heads=options.heads,
            vocab_size=options.vocab_size,
        )

    def settings(self, contender: Contender) -> Settings:
        return Settings(
            num_splits=contender.num_splits,
            balance_method=contender.balance,
            attention=None,
            metrics_file=None,
            sequence_length=self.options.length,
            multiple=1,
            cost=self.cost,
            kind=contender.kind,
        )

    def step(self, contender: Contender, num_micro_batches: int) -> dict[str, Any]:
        """Run one step and return its length, every stage's idle share and memory, and the loss."""
        session.settings = self.settings(contender)
        self.model.zero_grad_buffer()
        dist.barrier()
        reports = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=repeat(self.batch),
            model=self.model,
            num_microbatches=num_micro_batches,
            seq_length=self.options.length,
            micro_batch_size=1,
        )
        total = sum(float(r["lm loss"][0] / r["lm loss"][1]) for r in reports) if reports else 0.0
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (session.meter.last, total / num_micro_batches))
        figures = [figure for figure, _ in gathered]
        return {
            "seconds": max(figure.seconds for figure in figures),
            "bubble": bubble_ratios(figures),
            "busy": [figure.busy_seconds for figure in figures],
            "peak_bytes": [figure.peak_activation_bytes for figure in figures],
            "carry_bytes": [figure.kv_carry_bytes for figure in figures],
            "loss": gathered[-1][1],
        }


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total, count = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def _forward_step(data: Any, model: Any) -> Any:
    batch = get_batch_on_this_cp_rank(
        dict(next(data)),
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def measure(bench: Bench, num_micro_batches: int) -> list[dict[str, Any]]:
    """Alternate all contenders and return a row for each."""
    field = contenders(bench.options.splits)
    runs: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in field}
    for round_number in range(bench.options.rounds + 1):
        first = round_number % len(field)
        for contender in (*field[first:], *field[:first]):
            figures = bench.step(contender, num_micro_batches)
            if round_number:  # the first round warms caches and allocators up
                runs[contender.name].append(figures)
    median = {
        name: statistics.median(run["seconds"] for run in done) for name, done in runs.items()
    }
    lengths = {
        contender.name: [
            part.length for part in bench.settings(contender).cut(bench.options.length)
        ]
        for contender in field
    }
    stages = dist.get_world_size()
    return [
        {
            "schedule": contender.name,
            "micro_batches": num_micro_batches,
            "splits": contender.num_splits,
            "lengths": lengths[contender.name],
            "imbalance": imbalance(lengths[contender.name], bench.cost),
            "seconds_median": median[contender.name],
            "speedup": median[field[0].name] / median[contender.name],
            "speedup_in_theory": speedup_over_1f1b(
                stages, 1, num_micro_batches, contender.num_splits
            ),
            "bubble": [
                statistics.median(column)
                for column in zip(*(run["bubble"] for run in runs[contender.name]), strict=True)
            ],
            "busy_seconds": [
                statistics.median(column)
                for column in zip(*(run["busy"] for run in runs[contender.name]), strict=True)
            ],
            "bubble_in_theory": bubble_ratio(stages, 1, num_micro_batches, contender.num_splits),
            "peak_mib": [number / MIB for number in runs[contender.name][-1]["peak_bytes"]],
            "carry_mib": [number / MIB for number in runs[contender.name][-1]["carry_bytes"]],
            "live_micro_batches_in_theory": live_micro_batches(
                stages, num_micro_batches, contender.num_splits
            ),
            "loss": runs[contender.name][-1]["loss"],
        }
        for contender in field
    ]


def markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the report, a table in Markdown."""
    lines = [
        f"{options.layers} layers, hidden {options.hidden_size}, {options.heads} heads, vocabulary "
        f"{options.vocab_size}, {options.length} tokens, float32, {dist.get_world_size()} stages, "
        f"one core each; torch {torch.__version__}; medians of {options.rounds} alternating "
        f"rounds; {platform.machine()}, {os.cpu_count()} cores, {datetime.date.today()}.",
        "",
        "| m | schedule | s/step | speedup | theory | computing s by stage | bubble by stage | "
        "theory | activation MiB by stage | of which KV carry |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['micro_batches']} | {row['schedule']} | {row['seconds_median']:.3f} | "
            f"{row['speedup']:.3f} | {row['speedup_in_theory']:.3f} | "
            f"{_joined(row['busy_seconds'], '.3f')} | "
            f"{_joined(row['bubble'], '.3f')} | {row['bubble_in_theory']:.3f} | "
            f"{_joined(row['peak_mib'], '.1f')} | {_joined(row['carry_mib'], '.1f')} |"
        )
    return "\n".join(lines) + "\n"


def _joined(numbers: list[float], form: str) -> str:
    return ", ".join(format(number, form) for number in numbers)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument(
        "--count-output-layer",
        action="store_true",
        help="give the last stage one transformer layer less",
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--splits", type=int, nargs="+", default=[4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {rank % os.cpu_count()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    bench = Bench(options)
    rows = [row for m in options.micro_batches for row in measure(bench, m)]
    if rank == 0:
        report = markdown(rows, options)
        print(report)
        if options.output:
            options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(report)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
