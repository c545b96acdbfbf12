"""One process against a group of ranks: the loss, and the gradient of every parameter."""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seq1f1b.ulysses.batch import pad_for_sequence_parallel, split_for_sequence_parallel
from seq1f1b.ulysses.causal_loss import target_loss
from seq1f1b.ulysses.check.batches import Batch
from seq1f1b.ulysses.dispatch import dispatch_modules
from seq1f1b.ulysses.labels import IGNORED, shift_labels, unmark
from seq1f1b.ulysses.loss import reduce_sequence_parallel_loss
from seq1f1b.ulysses.signature import Signature

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
_NEGLIGIBLE = 1e-2
"""Share of the largest gradient below which a gradient's error is measured against that share.

Gradients that small are sums that cancel: OPT's key biases are nothing but rounding.
"""
_ULP, _DRAWS, _ROUNDINGS = 2.0**-24, 3, 3.0
"""Half a unit in the last place of float32, how often it is drawn, and how often its effect an
error may be.
"""


@dataclass(frozen=True)
class Comparison:
    """Relative errors of one batch; ``gradients`` by parameter.

    rounding: how far gradients of one process, and its loss ("", in units of its tolerance), move
    when each weight moves by its own rounding; known where an error is above the tolerance.
    """

    layout: str
    num_rows: int
    size: int
    loss: float
    wanted_loss: float
    gradients: dict[str, float]
    rounding: dict[str, float] = field(default_factory=dict)

    @property
    def loss_error(self) -> float:
        """Of the loss."""
        return abs(self.loss - self.wanted_loss) / max(abs(self.wanted_loss), 1e-12)

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much."""
        return max(self.gradients.items(), key=lambda x: _as_large(x[1]), default=("", 0.0))

    @property
    def is_within_tolerance(self) -> bool:
        """Whether the loss is within 1e-6 and every gradient within 1e-5."""
        return self.loss_error <= LOSS_TOLERANCE and self.worst[1] <= GRADIENT_TOLERANCE

    @property
    def is_exact(self) -> bool:
        """Whether loss and gradients agree as far as float32 goes.

        Some gradients, such as that of a gated delta rule's decay, are not within 1e-5 of float64
        in one process either; they may differ by as much as rounding the weights moves them.
        """
        errors = {"": self.loss_error / LOSS_TOLERANCE * GRADIENT_TOLERANCE, **self.gradients}
        return all(
            error <= max(GRADIENT_TOLERANCE, _ROUNDINGS * self.rounding.get(name, 0.0))
            for name, error in errors.items()
        )


def _as_large(error: float) -> float:
    return float("inf") if error != error else error


def one_process(
    model: nn.Module, batch: Batch, *, packed_as_one_row: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of transformers itself, in this process alone.

    Packed documents are computed one by one, because transformers lets some families' documents see
    each other; their losses are summed and divided by the targets of all. With
    ``packed_as_one_row``, whole rows are computed, as position scaling by the longest document
    demands.
    """
    model.zero_grad(set_to_none=True)
    if batch.is_packed:
        loss = _by_document(model, batch, packed_as_one_row=packed_as_one_row)
    else:
        loss = _call(
            model,
            batch.input_ids,
            batch.position_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
        ).loss
    loss.backward()
    return float(loss.detach()), _gradients(model)


def _by_document(model: nn.Module, batch: Batch, *, packed_as_one_row: bool) -> Tensor:
    """Return the loss over documents that are computed apart."""
    targets = unmark(shift_labels(batch.labels, batch.position_ids))
    num_items = int((targets != IGNORED).sum())
    whole = ((0, batch.input_ids.shape[1]),)
    parts = [
        (slice(row, row + 1), slice(start, end))
        for row, documents in enumerate(batch.documents)
        for start, end in (whole if packed_as_one_row else documents)
    ]
    outputs = [_call(model, batch.input_ids[part], batch.position_ids[part]) for part in parts]
    losses = [
        target_loss(output.logits, targets[part], num_items)
        for output, part in zip(outputs, parts, strict=True)
    ]
    return sum(losses, _balance_loss(model, outputs))


def _balance_loss(model: nn.Module, outputs: Sequence[Any]) -> Tensor:
    """Return the auxiliary loss of the routers over all documents, if the model returns one."""
    aux = getattr(outputs[0], "aux_loss", None)
    if aux is None:
        return torch.zeros(())
    layers = zip(*(output.router_logits for output in outputs), strict=True)
    function = vars(sys.modules[type(model).__module__])["load_balancing_loss_func"]
    sizes = model.num_experts, model.num_experts_per_tok
    return model.router_aux_loss_coef * function(tuple(torch.cat(x) for x in layers), *sizes)


def group(model: nn.Module, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of this rank's group, averaged over all ranks, as DDP does it.

    ``model`` is dispatched.
    """
    model.zero_grad(set_to_none=True)
    input_ids, labels, position_ids, attention_mask = pad_for_sequence_parallel(
        batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask
    )
    input_ids, labels, position_ids = split_for_sequence_parallel(input_ids, labels, position_ids)
    output = _call(model, input_ids, position_ids, attention_mask=attention_mask, labels=labels)
    loss = reduce_sequence_parallel_loss(output.loss, (labels != IGNORED).sum())
    loss.backward()
    gradients = _gradients(model)
    if dist.is_initialized() and dist.get_world_size() > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return float(loss.detach()), gradients


def compare(
    build: Callable[[], nn.Module],
    batches: Sequence[tuple[str, Batch]],
    size: int,
    *,
    packed_as_one_row: bool = False,
) -> list[Comparison]:
    """Run every batch both ways on this rank; results are on rank 0, other ranks return none.

    build: makes the model, with the same weights on every rank. packed_as_one_row: see
    ``one_process``.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    alone = build() if is_first else None
    shared = dispatch_modules(build())
    results = []
    for layout, batch in batches:
        wanted = None
        if alone is not None:
            wanted = one_process(alone, batch, packed_as_one_row=packed_as_one_row)
        loss, gradients = group(shared, batch)
        if alone is not None and wanted is not None:
            errors = gradient_errors(gradients, wanted[1])
            num_rows = batch.input_ids.shape[0]
            result = Comparison(layout, num_rows, size, loss, wanted[0], errors)
            if not result.is_within_tolerance:
                moved = [
                    one_process(_rounded(alone, seed), batch, packed_as_one_row=packed_as_one_row)
                    for seed in range(_DRAWS)
                ]
                result = replace(result, rounding=_rounding(wanted, moved))
            results.append(result)
    return results


def _rounded(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy whose weights are moved by their own rounding."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1 + _ULP * torch.randn(parameter.shape, generator=generator))
    return moved


def _rounding(
    wanted: tuple[float, dict[str, Tensor]], moved: list[tuple[float, dict[str, Tensor]]]
) -> dict[str, float]:
    """Return the most that loss and gradients have moved."""
    losses = [abs(loss - wanted[0]) / max(abs(wanted[0]), 1e-12) for loss, _ in moved]
    gradients = [gradient_errors(found, wanted[1]) for _, found in moved]
    return {
        "": max(losses) / LOSS_TOLERANCE * GRADIENT_TOLERANCE,
        **{name: max(errors[name] for errors in gradients) for name in wanted[1]},
    }


def gradient_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Return ``|g - r| / |r|`` of every gradient, in norms.

    Where |r| is less than a hundredth of the largest gradient, that hundredth stands in for it.
    """
    largest = max((float(x.norm()) for x in wanted.values()), default=0.0)
    errors = {}
    for name, gradient in wanted.items():
        own = found.get(name)
        difference = gradient if own is None else own - gradient
        scale = max(float(gradient.norm()), _NEGLIGIBLE * largest, 1e-30)
        errors[name] = float(difference.norm()) / scale
    return errors


def _call(model: nn.Module, input_ids: Tensor, position_ids: Tensor, **more: Any) -> Any:
    signature = Signature.read(model)
    arguments = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **more}
    return model(**{k: x for k, x in arguments.items() if x is not None and signature.accepts(k)})


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every trainable parameter's gradient, zero where none arrived."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
