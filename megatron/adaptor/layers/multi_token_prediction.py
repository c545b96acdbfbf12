"""Multi-token prediction over sub-sequences: the next token may be in the next one.

Its layers embed token i + k and predict token i + k + 1 at position i, for which Megatron rolls
tokens, labels and mask to the left. Here those of the whole micro-batch are rolled and the running
sub-sequence cut out again. Losses are divided by the whole micro-batch's number of tokens, so that
those of all sub-sequences add up.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron.adaptor.patches import Patch
from megatron.adaptor.step.batch_feed import BatchCutter
from seq1f1b.runtime import ExecutionContext

_MODULE = "megatron.core.transformer.multi_token_prediction"


class MultiTokenPrediction:
    """Rolls what ``cutter`` has cut as part of the whole micro-batch."""

    def __init__(self, context: ExecutionContext, cutter: BatchCutter) -> None:
        self._context = context
        self._cutter = cutter

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's multi-token prediction."""
        return [
            Patch(f"{_MODULE}:roll_tensor", self.roll_tensor),
            Patch(f"{_MODULE}:process_mtp_loss", self.process_mtp_loss),
        ]

    def roll_tensor(
        self, original: Callable[..., Any], tensor: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the tokens after a sub-sequence's last from the next one."""
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

    def process_mtp_loss(
        self,
        original: Callable[..., Any],
        *,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Divide losses by the number of tokens in the whole micro-batch."""
        if self._context.cut_part is not None:
            labels, loss_mask = self._whole(labels), self._whole(loss_mask)
        return original(labels=labels, loss_mask=loss_mask, **kwargs)

    def _whole(self, tensor: Tensor | None) -> Tensor | None:
        """Return what ``tensor`` was cut from; rolling turns it into the sub-sequence's again."""
        whole = None if tensor is None else self._cutter.whole_of(tensor)
        return tensor if whole is None else whole
