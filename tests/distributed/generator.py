"""Random combinations of Megatron's settings and of scripts, each compared with one split.

    python -m tests.distributed.generator --cases 300 --seed 0

Every case must give the numbers of one split or be refused. A failing case is named by its number,
with which --only runs it alone.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from tests.distributed.families import LATENT, LATENT_SPEC, LLAMA, RMS_NORM, full, selective
from tests.distributed.megatron_model import Case
from tests.distributed.situations import BATCHES, LOSSES, Situation, difference
from tests.workers import WorkerError, WorkerPool

DEFAULT_SEED = 0
TOLERANCE = 2e-5

FAMILIES: dict[str, dict[str, Any]] = {
    "GPT": {"positions": "learned_absolute", "tied": True},
    "GPT, M-RoPE": {"positions": "mrope", "config": {"mrope_section": [1, 1, 0]}},
    "Llama": {"config": LLAMA, "spec": RMS_NORM},
    "Qwen3": {"config": LLAMA | {"qk_layernorm": True}, "spec": RMS_NORM | {"qk_layernorm": True}},
    "DeepSeek": {"config": LATENT, "spec": LATENT_SPEC},
    "Llama, predicting 2 tokens": {"config": LLAMA | {"mtp_num_layers": 2}, "spec": RMS_NORM},
}
EXPERTS: tuple[Any, ...] = (None, None, "aux_loss", "seq_aux_loss", ["aux_loss", "seq_aux_loss"])
RECOMPUTED: tuple[dict[str, Any], ...] = (
    {},
    {},
    full("uniform", 1),
    full("block", 1),
    selective("core_attn"),
    selective("layernorm"),
)
# stages, tensor-parallel, context-parallel, replicas; at most 4 ranks
LAYOUTS = ((1, 1, 1, 1), (2, 1, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2))
# Micro-batches whose sub-sequences alternate, on one stage.
MIXED = (
    "0F0.0 0F1.0 0F0.1 0F1.1 0F1.2 0F0.2 0B0.2 0B1.2 0B0.1 0B0.0 0B1.1 0B1.0",
    "0F1.0 0F0.0 0F0.1 0F0.2 0B0.2 0F1.1 0F1.2 0B0.1 0B1.2 0B1.1 0B0.0 0B1.0",
)


def situation(seed: int, number: int) -> Situation:
    """Return case ``number`` of ``seed``, of combinations that Megatron itself knows."""
    draw = random.Random(f"{seed}/{number}")
    while True:
        drawn = _draw(draw)
        if _is_known(drawn):
            return drawn


def _draw(draw: random.Random) -> Situation:
    stages, tensor, context, replicas = draw.choice(LAYOUTS)
    family = FAMILIES[draw.choice(list(FAMILIES))]
    config = dict(family.get("config", {})) | draw.choice(RECOMPUTED)
    experts = draw.choice(EXPERTS) if "spec" in family else None
    if isinstance(experts, list):
        config["moe_aux_loss_coeff"] = [0.5, 0.3]
    chunks = draw.choice((1, 1, 2)) if stages > 1 else 1
    splits = draw.choice((2, 3, 4))
    case = Case(
        stages,
        draw.choice((2, 4)),
        splits,
        draw.choice(("average", "uniform_comp")),
        draw.choice(("1f1b", "1f1b", "zb-h1", "greedy")),
        num_chunks=chunks,
        length=draw.choice((32, 40, 48)),
        rows=draw.choice((1, 2, 3)),
        per_token=draw.random() < 0.3,
        experts=experts,
        documents=draw.choice((None, None, None, "tokens", "position_ids")),
        tensor=tensor,
        sequence_parallel=tensor > 1 and draw.random() < 0.7,
        context=context,
        replicas=replicas,
        **{k: v for k, v in family.items() if k != "config"},
        config=config,
    )
    if stages == 1 and draw.random() < 0.5:
        order = draw.choice(MIXED)
        case = replace(case, num_micro_batches=2, num_splits=3, kind="1f1b", order=order)
    evaluates = draw.random() < 0.15
    batch = draw.choice(list(BATCHES))
    if case.positions == "mrope":
        batch = "positions of M-RoPE"
    return Situation(case, draw.choice(list(LOSSES)), batch, evaluates=evaluates)


def _is_known(situation: Situation) -> bool:
    """Whether Megatron itself, with one split, computes such a thing as it is meant."""
    case, loss, batch = situation.case, situation.loss, situation.batch
    predicts = bool(case.config.get("mtp_num_layers"))
    uneven = batch in ("plain", "masked prompt", "labels of -100", "padding mask")
    return not (
        (case.kind == "zb-h1" and case.num_chunks > 1)
        or (case.num_chunks > 1 and case.layers % (case.num_stages * case.num_chunks))
        or (case.experts and case.tensor > 1 and not case.sequence_parallel)
        or (predicts and (case.context > 1 or case.documents or batch == "labels of -100"))
        or (predicts and loss == "of logits")
        or (case.documents and (case.context > 1 or "mask" in batch or case.positions == "mrope"))
        or (batch == "positions of M-RoPE" and case.positions != "mrope")
        or (case.positions == "mrope" and case.context > 1)  # Megatron deals the wrong dimension
        or (batch == "padding mask" and (not case.experts or case.tensor * case.context > 1))
        or (batch == "prefix mask" and (case.context > 1 or case.num_stages > 1))
        or (loss == "of logits" and case.tensor > 1)
        or (case.context > 1 and uneven and not case.per_token)
        or (case.context > 1 and case.per_token and loss not in ("sum, count", "mean"))
        or (case.tensor > 1 and "q_lora_rank" in case.config and not case.per_token)
        or (case.per_token and not loss.startswith("sum"))
        or (loss == "mean, unclamped" and batch == "labels of -100")
    )


def run(situations: Sequence[Situation], pools: dict[int, WorkerPool]) -> list[str]:
    """Run situations, grouped by number of ranks; return what is wrong with each, or ""."""
    found = [""] * len(situations)
    for size in sorted({s.case.num_ranks for s in situations}):
        pool = pools.setdefault(size, WorkerPool(size))
        mine = [i for i, s in enumerate(situations) if s.case.num_ranks == size]
        for index in mine:
            found[index] = _verdict(pool, situations[index])
    return found


def _verdict(pool: WorkerPool, situation: Situation) -> str:
    try:
        worst = max(pool.run(difference, situation, timeout=120))
    except WorkerError as error:
        return "" if "--seq1f1b-splits 1" in str(error) else str(error).strip().splitlines()[-1]
    return "" if worst < TOLERANCE else f"differs from one split by {worst:.2g}"


def written(situation: Situation) -> str:
    """Return what is not as by default."""
    parts = [
        f"{field.name}={getattr(of, field.name)!r}"
        for of in (situation, situation.case)
        for field in fields(of)
        if field.name != "case" and getattr(of, field.name) != field.default
    ]
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases")
    options = parser.parse_args(arguments)
    numbers = options.only or range(options.cases)
    pools: dict[int, WorkerPool] = {}
    start, wrong = time.monotonic(), 0
    try:
        for number in numbers:
            drawn = situation(options.seed, number)
            (verdict,) = run([drawn], pools)
            if verdict:
                wrong += 1
                print(f"case {number}: {verdict}\n  {written(drawn)}", flush=True)
            if sys.stderr.isatty():
                print(f"\r{number + 1} of {len(numbers)}, {wrong} wrong", end="", file=sys.stderr)
    finally:
        for pool in pools.values():
            pool.close()
    print(
        f"{len(numbers)} cases of seed {options.seed}: {wrong} wrong "
        f"({time.monotonic() - start:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
