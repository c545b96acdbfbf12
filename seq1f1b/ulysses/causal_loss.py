"""The loss of next-token prediction, for targets that are shifted already."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from seq1f1b.ulysses.labels import IGNORED
from seq1f1b.ulysses.run import require_run


def target_loss(logits: Tensor, targets: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return the summed cross-entropy over ``num_items``, or over the number of targets.

    logits ``[b, n, vocabulary]``, targets ``[b, n]`` with -100 where there is none. In float32 at
    least; without any target it is 0 and so is its gradient.
    """
    targets = targets.to(logits.device)
    scores = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(scores, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def shifted_loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Take the place of a model's ``loss_function``: its labels are targets here."""
    run = require_run("a loss function")
    run.num_losses += 1
    return target_loss(logits, labels, run.num_items)


def is_usual_loss(loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
    """Whether ``loss`` is the mean cross-entropy of labels that the model has shifted itself."""
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    wanted = target_loss(logits, shifted)
    coarse = torch.bfloat16 in (loss.dtype, logits.dtype) or torch.float16 in (
        loss.dtype,
        logits.dtype,
    )
    return bool(torch.isclose(loss.to(wanted.dtype), wanted, rtol=2e-3 if coarse else 1e-5, atol=0))
