"""Every combination of settings that is worth a look."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from seq1f1b.planner.arguments import Arguments
from seq1f1b.planner.model import Model

Values = dict[str, Any]

_MOST_TENSOR, _MOST_CONTEXT, _MOST_STAGES = 8, 16, 64
_SPLITS = (1, 2, 4, 8, 16, 32)
_CHUNKS = (1, 2, 4, 8)
_FEWEST_TOKENS = 512
_SHORT = 8192
_VIRTUAL = (
    "num_virtual_stages_per_pipeline_rank",
    "num_layers_per_virtual_pipeline_stage",
    "pipeline_model_parallel_layout",
)
_FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def spreads(
    given: Mapping[str, Any], model: Model, num_gpus: int, gpus_per_node: int
) -> Iterator[Values]:
    """Yield every way to spread a model over GPUs: TP, CP, PP, EP and the micro-batch size.

    What is ``given`` is kept.
    """
    tensor = _choices(
        given, "tensor_model_parallel_size", _powers(min(_MOST_TENSOR, gpus_per_node))
    )
    context = _choices(given, "context_parallel_size", _powers(_MOST_CONTEXT))
    rows = _choices(given, "micro_batch_size", _batches(given))
    for tp, cp in product(tensor, context):
        if num_gpus % (tp * cp) or (tp > 1 and model.heads % tp):
            continue
        stages = _choices(
            given,
            "pipeline_model_parallel_size",
            _divisors(num_gpus // (tp * cp), min(_MOST_STAGES, model.num_layers)),
        )
        for pp, mbs in product(stages, rows):
            if num_gpus % (tp * cp * pp):
                continue
            values = {
                "tensor_model_parallel_size": tp,
                "context_parallel_size": cp,
                "pipeline_model_parallel_size": pp,
                "micro_batch_size": mbs,
            }
            if tp > 1:
                values["sequence_parallel"] = given.get("sequence_parallel", True)
            if model.experts is None:
                yield values
                continue
            for ep in _choices(given, "expert_model_parallel_size", _expert_ranks(num_gpus // pp)):
                if model.experts.count % ep == 0 and ep <= model.experts.count:
                    shards = given.get("expert_tensor_parallel_size", 1)
                    yield values | {
                        "expert_model_parallel_size": ep,
                        "expert_tensor_parallel_size": shards,
                    }


def _expert_ranks(most: int) -> list[int]:
    """Return some numbers of expert-parallel ranks, of the ``most`` that a stage has."""
    return [ranks for ranks in (1, 4, 8, 16, 32, 64) if most % ranks == 0]


def schedules(
    given: Mapping[str, Any], model: Model, spread: Mapping[str, Any], seq_length: int
) -> Iterator[Values]:
    """Yield numbers of sub-sequences and of model chunks for a spread."""
    pp, cp = spread["pipeline_model_parallel_size"], spread["context_parallel_size"]
    tp = spread["tensor_model_parallel_size"]
    heads = model.heads if model.latent else model.groups
    most = max(1, seq_length // _FEWEST_TOKENS)
    splits = [s for s in _SPLITS if s <= most] if pp > 1 and heads % (tp * cp) == 0 else [1]
    for s in _choices(given, "seq1f1b_splits", splits):
        chosen: Values = {"seq1f1b_splits": s} if s > 1 else {}
        if any(given.get(name) is not None for name in _VIRTUAL) or pp == 1:
            yield chosen
            continue
        for v in _CHUNKS:
            if v == 1:
                yield chosen
            elif pp * v <= model.num_layers:
                yield chosen | {"num_virtual_stages_per_pipeline_rank": v}


def recomputations(given: Mapping[str, Any], model: Model) -> list[Values]:
    """Return what may be computed anew, the least first; what is ``given`` alone."""
    if any(given.get(name) for name in ("recompute_granularity", "recompute_activations")):
        return [{}]
    modules = [("layernorm",), ("mlp",), ("layernorm", "mlp")]
    if model.experts is not None:
        modules = [("layernorm",), ("moe",)]
    selective = [
        {"recompute_granularity": "selective", "recompute_modules": names} for names in modules
    ]
    return [{}, *selective, dict(_FULL)]


def _choices(given: Mapping[str, Any], name: str, others: list[int]) -> list[int]:
    value = given.get(name, getattr(Arguments(), name))
    is_given = name in given and value is not None
    return [int(value)] if is_given else others


def _batches(given: Mapping[str, Any]) -> list[int]:
    return [1, 2, 4] if (given.get("seq_length") or 0) <= _SHORT else [1]


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent <= most]


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]
