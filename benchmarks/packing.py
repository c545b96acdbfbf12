"""Simulated bubble of packed documents: cut by real lengths, blindly, and evenly.

    python tools/make_corpus.py --output-dir data --vocab-size 8192
    python benchmarks/packing.py --corpus data

Documents are shuffled, each followed by an end-of-document token, laid one behind the other and cut
into samples, as Megatron's GPTDataset does. Every step of consecutive samples, one a micro-batch,
is simulated three times: sub-sequences of equal length, of equal computation if each sample were
one document, and of equal computation by the documents that it holds. Transfers take no time, so
that all idle time comes from the schedule and from unequal computations.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import batched
from pathlib import Path

from tokenizers import Tokenizer

from seq1f1b.schedule import Schedule, one_f_one_b
from seq1f1b.sequence import Documents, PackedCost, TokenCost, partition, sub_sequences
from seq1f1b.simulate import Costs, CostsByMicroBatch, simulate

MODELS = {
    "0.1B (12 layers, hidden 768)": TokenCost.of_transformer(
        num_layers=12, hidden_size=768, num_attention_heads=12, vocab_size=8192
    ),
    "7B (32 layers, hidden 4096)": TokenCost.of_transformer(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        ffn_hidden_size=11008,
        gated_linear_unit=True,
        vocab_size=8192,
    ),
}
CUTS = ("average", "uniform_comp, length-blind", "uniform_comp, by documents")
CHUNK = 256


@dataclass(frozen=True)
class Setting:
    """One row of the report."""

    model: str
    num_stages: int
    num_splits: int
    num_micro_batches: int


@dataclass(frozen=True)
class Result:
    """Means over all steps; ratios are idle time over total time of all stages.

    carried_share: tokens whose keys and values cross sub-sequences, of all tokens.
    """

    bubble: dict[str, float]
    step_time: dict[str, float]
    carried_share: dict[str, float]
    num_steps: int


def document_lengths(folder: Path) -> list[int]:
    """Tokenise the corpus and return every document's length, its end-of-document token counted."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    lengths: list[int] = []
    with open(folder / "corpus.jsonl", encoding="utf-8") as file:
        for lines in batched(file, CHUNK):
            encoded = tokenizer.encode_batch_fast([json.loads(line)["content"] for line in lines])
            lengths += [len(one.ids) + 1 for one in encoded]
    return lengths


def samples(lengths: Sequence[int], total: int) -> Iterator[Documents]:
    """Lay documents one behind the other and cut them into samples; the last is left out."""
    starts, filled = [0], 0
    for length in lengths:
        while filled + length >= total:
            length -= total - filled
            yield Documents(tuple(starts), total)
            starts, filled = [0], 0
        if length:
            filled += length
            starts.append(filled)


@cache
def schedule_of(num_stages: int, num_micro_batches: int, num_splits: int) -> Schedule:
    """Make a Seq1F1B schedule, once per shape."""
    return one_f_one_b(num_stages, num_micro_batches, num_splits)


def cut(name: str, documents: Documents, cost: TokenCost, num_splits: int) -> tuple[int, ...]:
    """Return the lengths of a sample's sub-sequences."""
    if name == "average":
        return partition(documents.total, num_splits)
    known = PackedCost(cost, [documents]) if name.endswith("documents") else cost
    return partition(documents.total, num_splits, method="uniform_comp", cost=known)


def measure(setting: Setting, packed: Sequence[Documents]) -> Result:
    """Simulate all steps that the samples fill."""
    schedule = schedule_of(setting.num_stages, setting.num_micro_batches, setting.num_splits)
    cost = MODELS[setting.model]
    bubble: dict[str, float] = {}
    step_time: dict[str, float] = {}
    carried: dict[str, float] = {}
    size = schedule.num_micro_batches
    steps = [step for step in batched(packed, size) if len(step) == size]
    for name in CUTS:
        results = []
        num_carried = 0
        for step in steps:
            each = []
            for documents in step:
                lengths = cut(name, documents, cost, setting.num_splits)
                num_carried += documents.carried(sub_sequences(lengths))
                real = PackedCost(cost, [documents])
                each.append(Costs.of_tokens(schedule, real, lengths, flops_per_second=1e14))
            results.append(simulate(schedule, CostsByMicroBatch(tuple(each))))
        bubble[name] = statistics.fmean(result.bubble_ratio for result in results)
        step_time[name] = statistics.fmean(result.step_time for result in results)
        carried[name] = num_carried / (len(steps) * len(steps[0]) * steps[0][0].total)
    return Result(bubble, step_time, carried, len(steps))


def row(setting: Setting, result: Result) -> str:
    """Format a line of the report."""
    ideal = (setting.num_stages - 1) / setting.num_splits
    theory = ideal / (setting.num_micro_batches + ideal)
    by_length = result.step_time[CUTS[-1]]
    gains = [result.step_time[name] / by_length for name in CUTS[:-1]]
    cells = [
        setting.model,
        *map(str, (setting.num_stages, setting.num_splits, setting.num_micro_batches)),
        *(f"{result.bubble[name]:.4f}" for name in CUTS),
        f"{theory:.4f}",
        *(f"{gain:.3f}x" for gain in gains),
        *(f"{result.carried_share[name]:.2f}" for name in CUTS),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| model | p | s | m | bubble, average | bubble, length-blind | bubble, by documents | "
    "equal computations | step time, average | step time, length-blind | "
    "KV carried, average | KV carried, length-blind | KV carried, by documents |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Tokenise, pack, simulate and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, required=True, help="output of tools/make_corpus.py")
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--output", type=Path, help="FILE.json; a table goes to FILE.md beside it")
    args = parser.parse_args()
    lengths = document_lengths(args.corpus)
    random.Random(1234).shuffle(lengths)
    packed = list(samples(lengths, args.seq_length))
    begin = time.perf_counter()
    for documents in packed:
        cut(CUTS[-1], documents, MODELS["7B (32 layers, hidden 4096)"], args.splits)
    microseconds = (time.perf_counter() - begin) / len(packed) * 1e6
    settings = [
        Setting(model, p, args.splits, m)
        for model in MODELS
        for p in args.stages
        for m in args.micro_batches
    ]
    measured = [(setting, measure(setting, packed)) for setting in settings]
    about = (
        f"{len(lengths):,} documents of the standard library of Python "
        f"{platform.python_version()}, {sum(lengths):,} tokens, median "
        f"{statistics.median(lengths):,.0f}; {len(packed)} samples of {args.seq_length} tokens "
        f"with {statistics.fmean(len(d.starts) for d in packed):.1f} documents on average; cutting "
        f"one takes {microseconds:.0f} microseconds."
    )
    report = "\n".join([about, "", HEADER, *(row(*entry) for entry in measured)])
    print(report)
    if args.output:
        args.output.write_text(
            json.dumps(
                {"data": about, "rows": [{**vars(s), **vars(r)} for s, r in measured]}, indent=1
            )
            + "\n"
        )
        args.output.with_suffix(".md").write_text(report + "\n")


if __name__ == "__main__":
    main()
