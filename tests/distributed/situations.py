"""Megatron scripts in all their variety, each run with one split and with several, and compared."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tests.distributed.megatron_model import (
    VOCAB,
    Case,
    micro_batches,
    settings_of,
    stage_chunks,
    whole_model,
)

ITERATIONS = 2
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Situation:
    """A training script and its data, by the names of its parts.

    loss: one of LOSSES. batch: one of BATCHES. change: one of CHANGES, made to the batch after it
    was cut. case: shape of the pipeline and the model. evaluates: go forward only. iterations:
    steps with an update after each.
    """

    case: Case
    loss: str = "sum, count"
    batch: str = "plain"
    change: str = "nothing"
    evaluates: bool = False
    iterations: int = ITERATIONS


@dataclass
class Result:
    """Reports of all micro-batches and gradients of this rank, for each iteration."""

    reports: list[Any] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


# ------------------------------------------------------------------------------- loss functions


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _mask(batch: dict[str, Any]) -> Tensor:
    mask = batch.get("loss_mask")
    return (batch["labels"] != -100).float() if mask is None else mask


def _pair(loss: Tensor) -> Any:
    return loss, {"lm loss": _clone(loss)[None]}


def _sum_and_count(batch: dict[str, Any], losses: Tensor) -> Any:
    mask = _mask(batch)
    total, count = (losses.float() * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([_clone(total), count.float()])}


def _with_a_mean(batch: dict[str, Any], losses: Tensor) -> Any:
    total, count, report = _sum_and_count(batch, losses)
    mean = _clone(total) / count.clamp(min=1)
    return total, count, {**report, "mean": mean[None], "largest": _clone(losses.max())[None]}


def _of_sequences(batch: dict[str, Any], losses: Tensor) -> Any:
    mask = _mask(batch)
    of_rows = (losses * mask).sum(1) / mask.sum(1).clamp(min=1)
    return _pair((of_rows * torch.arange(1.0, len(of_rows) + 1)).mean())


def _of_logits(batch: dict[str, Any], logits: Tensor) -> Any:
    labels = torch.where(_mask(batch) > 0, batch["labels"], -100)
    return _pair(torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()))


LOSSES: dict[str, Callable[[dict[str, Any], Tensor], Any]] = {
    "sum, count": _sum_and_count,
    "sum, count and means": _with_a_mean,
    "mean": lambda b, x: _pair((x * _mask(b)).sum() / _mask(b).sum().clamp(min=1)),
    "mean, unclamped": lambda b, x: _pair((x * _mask(b)).sum() / _mask(b).sum()),
    "mean of everything": lambda b, x: _pair(x.mean()),
    "narrowed": lambda b, x: _pair(x[:, 10:].mean()),
    "weighted by position": lambda b, x: _pair((x * torch.linspace(0, 1, x.shape[1])).mean()),
    "squared": lambda b, x: _pair(x.mean() ** 2),
    "of sequences": _of_sequences,
    "worst tokens": lambda b, x: _pair(x.flatten().topk(7).values.mean()),
    "quantile": lambda b, x: _pair(torch.quantile(x.flatten(), 0.75)),
    "in place": lambda b, x: _pair(x.mul_(_mask(b)).sum() / 50),
    "of logits": _of_logits,
}


# --------------------------------------------------------------------------- batches and changes


def _masked_prompt(batch: dict[str, Any]) -> dict[str, Any]:
    mask = torch.ones_like(batch["loss_mask"])
    mask[:, : 2 * mask.shape[1] // 3] = 0.0
    return {**batch, "loss_mask": mask}


def _hugging_face(batch: dict[str, Any]) -> dict[str, Any]:
    labels = torch.where(batch["loss_mask"] > 0, batch["labels"], -100)
    return {key: value for key, value in batch.items() if key != "loss_mask"} | {"labels": labels}


def _padded(batch: dict[str, Any]) -> dict[str, Any]:
    length = batch["tokens"].shape[1]
    ends = torch.tensor([length // 3, length - 4, length])[: len(batch["tokens"])]
    is_padding = torch.arange(length)[None] >= ends[:, None]
    mask = batch["loss_mask"] * ~is_padding
    return {**batch, "padding_mask": is_padding, "loss_mask": mask}


def _causal_mask(batch: dict[str, Any]) -> dict[str, Any]:
    length = batch["tokens"].shape[1]
    return {**batch, "attention_mask": torch.ones(length, length).triu(1).bool()[None, None]}


def _prefix_mask(batch: dict[str, Any]) -> dict[str, Any]:
    mask = _causal_mask(batch)["attention_mask"].clone()
    mask[..., :5, :5] = False
    return {**batch, "attention_mask": mask}


def _three_positions(batch: dict[str, Any]) -> dict[str, Any]:
    places = batch["position_ids"]
    return {**batch, "position_ids": torch.stack([places, places // 2, places % 5])}


BATCHES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "plain": lambda batch: batch,
    "every token counts": lambda b: {**b, "loss_mask": torch.ones_like(b["loss_mask"])},
    "masked prompt": _masked_prompt,
    "labels of -100": _hugging_face,
    "padding mask": _padded,
    "causal mask": _causal_mask,
    "prefix mask": _prefix_mask,
    "positions of M-RoPE": _three_positions,
}

_calls = 0


def _count_calls(batch: dict[str, Any]) -> dict[str, Any]:
    global _calls
    _calls += 1
    return {**batch, "loss_mask": batch["loss_mask"] * _calls}


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nothing": lambda batch: batch,
    "scaled mask": lambda b: {**b, "loss_mask": b["loss_mask"] * 2.0},
    "rolled labels": lambda b: {**b, "labels": b["labels"].roll(-1, 1)},
    "own positions": lambda b: {**b, "position_ids": torch.arange(b["tokens"].shape[1])[None]},
    "random mask": lambda b: {**b, "loss_mask": (torch.rand_like(b["loss_mask"]) > 0.5).float()},
    "kept state": _count_calls,
}


# ------------------------------------------------------------------------------------- running


def forward_step_of(situation: Situation) -> Callable[..., Any]:
    """Return a forward step as Megatron's scripts have it; it knows nothing of sub-sequences."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    change, loss = CHANGES[situation.change], LOSSES[situation.loss]

    def forward_step(data: Iterator[Any] | None, model: Any) -> Any:
        if data is None:
            return model(None, None, None), None
        sample = next(data)
        sample["tokens"].clamp_(max=VOCAB - 2)  # in place, as some scripts do
        batch = get_batch_on_this_cp_rank(
            {**sample, "cu_seqlens": None},
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
        )
        batch = change(batch)
        extra = {"padding_mask": batch["padding_mask"]} if "padding_mask" in batch else {}
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=None if situation.loss == "of logits" else batch["labels"],
            loss_mask=batch.get("loss_mask"),
            **extra,
        )
        if batch.get("loss_mask") is not None:
            batch["loss_mask"] = batch["loss_mask"].view(-1).view(batch["labels"].shape)
        return output, lambda output: loss(batch, output)

    return forward_step


def run(situation: Situation) -> Result:
    """Train, or evaluate, on this rank's share of the model."""
    from megatron.adaptor import install

    session = install()
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    get_moe_metrics_tracker().metrics.clear()  # as long as another model has layers
    case = situation.case
    session.settings = settings_of(case)
    case.layout.enter()
    whole = whole_model(case)
    case.layout.enter(case.num_chunks)
    chunks = stage_chunks(case, whole)
    has_chunks = case.num_chunks > 1
    replica = parallel_state.get_data_parallel_rank()
    forward_step = forward_step_of(situation)
    result = Result()

    def reader(iteration: int) -> Iterator[Any]:
        """Return the same data anew, since scripts may change it in place."""
        data = micro_batches(case, seed=11 + iteration)[replica :: case.replicas]
        return iter([BATCHES[situation.batch](batch) for batch in data])

    for iteration in range(situation.iterations):
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[reader(iteration) for _ in chunks] if has_chunks else reader(iteration),
            model=chunks if has_chunks else chunks[0],
            num_microbatches=case.num_micro_batches,
            seq_length=case.length,
            micro_batch_size=case.rows,
            forward_only=situation.evaluates,
        )
        result.reports.append(reports)
        result.gradients.append(
            {
                f"{index}.{name}": parameter.main_grad.clone()
                for index, chunk in enumerate(chunks)
                for name, parameter in chunk.named_parameters()
            }
        )
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter -= LEARNING_RATE * parameter.main_grad
                chunk.zero_grad_buffer()
    return result


def difference(situation: Situation) -> float:
    """Run ``situation`` in Megatron's own loop and as it is; return the largest relative error.

    That is of any reported number, or of any gradient, as a part of the largest of its kind.
    """
    global _calls
    _calls = 0
    # Megatron's own attention is the truth, where its local layers can compute it.
    case = situation.case
    is_simple = case.context == 1 and not case.documents and "q_lora_rank" not in case.config
    plain = replace(
        case,
        num_splits=1,
        kind="auto",
        order="",
        attention="megatron" if is_simple else None,
    )
    try:
        one = run(replace(situation, case=plain))
    except Exception as error:  # a reference that fails is no refusal
        raise AssertionError(
            f"one split fails: {error}".replace("--seq1f1b-splits 1", "?")
        ) from None
    _calls = 0
    several = run(situation)
    errors = [0.0]
    for expected, got in zip(one.reports, several.reports, strict=True):
        assert len(expected) == len(got)
        for a, b in zip(expected, got, strict=True):
            assert a.keys() == b.keys()
            errors += [_error(b[key], a[key]) for key in a]
    if situation.evaluates:
        return max(errors)
    for expected, got in zip(one.gradients, several.gradients, strict=True):
        largest = max(tensor.abs().max().item() for tensor in expected.values())
        for name, tensor in expected.items():
            scale = max(tensor.abs().max().item(), 1e-3 * largest)
            errors.append((got[name] - tensor).abs().max().item() / scale)
    return max(_number(error) for error in errors)


def _error(value: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=1e-12)
    return ((value - expected).abs().max() / scale).item()


def _number(error: float) -> float:
    return float("inf") if error != error else error


def outcomes(situations: list[Situation]) -> list[float | str]:
    """Return for each situation its largest error on this rank, or what it was refused with."""
    found: list[float | str] = []
    for situation in situations:
        try:
            found.append(difference(situation))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found
