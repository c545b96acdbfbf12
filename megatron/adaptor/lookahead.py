"""Multi-token prediction over sub-sequences: the next token may be in the next one.

Its layers embed token i + k and predict token i + k + 1 at position i, for which Megatron rolls
tokens, labels and mask to the left. Here the whole micro-batch's are rolled and the running
sub-sequence cut out again. Their losses are divided by the whole micro-batch's number of tokens,
so that those of all sub-sequences add up.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron.adaptor.batch import BatchCutter
from megatron.adaptor.patches import Patch
from seq1f1b.runtime import ExecutionContext

_MODULE = "megatron.core.transformer.multi_token_prediction"


class Lookahead:
    """Rolls what ``cutter`` has cut as part of the whole micro-batch."""

    def __init__(self, context: ExecutionContext, cutter: BatchCutter) -> None:
        self._context = context
        self._cutter = cutter

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's multi-token prediction."""
        return [
            Patch(
                f"{_MODULE}:roll_tensor",
                ("tensor", "shifts", "dims", "cp_group", "packed_seq_params"),
                "takes the tokens after a sub-sequence's last from the next one",
                self._roll,
            ),
            Patch(
                f"{_MODULE}:process_mtp_loss",
                ("hidden_states", "labels", "loss_mask"),
                "divides losses by the number of tokens in the whole micro-batch",
                self._loss,
            ),
        ]

    def _roll(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def roll_tensor(tensor: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            part = self._context.cut_part
            if tensor is None or part is None:
                return original(tensor, *args, **kwargs)
            is_whole = tensor.shape[-1] == part.total
            whole = tensor if is_whole else self._cutter.whole_of(tensor)
            if whole is None:
                raise ValueError(
                    "multi-token prediction got tokens, labels or a loss mask that do not come "
                    "as they are from get_batch_on_this_cp_rank, so that the tokens after "
                    f"sub-sequence {part.index} are not known: use --seq1f1b-splits 1"
                )
            rolled, total = original(whole, *args, **kwargs)
            cut = rolled[..., part.start : part.stop].clone()
            self._cutter.remember(cut, rolled)
            return cut, total

        return roll_tensor

    def _loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def process_mtp_loss(
            *, labels: Tensor | None, loss_mask: Tensor | None, **kwargs: Any
        ) -> Tensor:
            if self._context.cut_part is not None:
                labels, loss_mask = self._whole(labels), self._whole(loss_mask)
            return original(labels=labels, loss_mask=loss_mask, **kwargs)

        return process_mtp_loss

    def _whole(self, tensor: Tensor | None) -> Tensor | None:
        """Return what ``tensor`` was cut from; rolling turns it into the sub-sequence's again."""
        whole = None if tensor is None else self._cutter.whole_of(tensor)
        return tensor if whole is None else whole
