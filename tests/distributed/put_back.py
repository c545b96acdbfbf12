"""Faults that were in the adaptor once, put back for as long as a context is open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from tests.distributed.situations import Situation, difference


@contextmanager
def batches_not_contiguous() -> Iterator[None]:
    from megatron.adaptor.step.batch_feed import BatchCutter

    def cut(cutter: Any, key: str, tensor: Any, part: Any) -> Any:
        if tensor.dim() < 2 or tensor.shape[1] != part.total:
            return tensor
        cut = tensor[:, part.start : part.stop]
        cutter.remember(cut, tensor)
        return cut

    with patch.object(BatchCutter, "_cut_tensor", cut):
        yield


@contextmanager
def losses_by_sub_sequence() -> Iterator[None]:
    """Weigh a mean of each sub-sequence by its length."""
    from megatron.adaptor.step.forward_steps import ForwardSteps

    def on_last_stage(steps: Any, action: Any, part: Any, *others: Any) -> Any:
        *_, loss, call = others
        share = part.length / part.total

        def weighted(output: Any, **kwargs: Any) -> Any:
            value, *rest, report = loss(output, **kwargs)
            return value * (1.0 if rest else share), *rest, report

        return call.output, weighted

    with patch.object(ForwardSteps, "_on_last_stage", on_last_stage):
        yield


@contextmanager
def padding_in_the_z_loss() -> Iterator[None]:
    """Weigh equally long sub-sequences equally, however much of them is padding."""
    from megatron.adaptor.layers.router_losses import _ZLoss

    class Counts(dict[int, Any]):
        def __setitem__(self, part: int, count: Any) -> None:
            super().__setitem__(part, 1)

    def init(losses: Any) -> None:
        losses.means, losses.counts = {}, Counts()

    with patch.object(_ZLoss, "__init__", init):
        yield


@contextmanager
def one_key_for_two_losses() -> Iterator[None]:
    from megatron.adaptor.layers.router_losses import RouterLosses

    def owner(losses: Any) -> Any:
        action = losses._context.action
        return action.chunk, action.micro_batch, losses._router

    with patch.object(RouterLosses, "_owner", property(owner)):
        yield


@contextmanager
def only_the_second_dimension_is_cut() -> Iterator[None]:
    from megatron.adaptor.step import batch_feed

    def second(shape: Any, total: int, *, name: str) -> int | None:
        return 1 if len(shape) > 1 and shape[1] == total else None

    with patch.object(batch_feed, "sequence_dim", second):
        yield


@contextmanager
def masks_unread() -> Iterator[None]:
    from megatron.adaptor.layers.attention import Attention
    from megatron.adaptor.step import batch_feed

    with (
        patch.object(batch_feed, "check_mask", lambda mask, documents: None),
        patch.object(Attention, "_is_causal", lambda *args: True),
    ):
        yield


@contextmanager
def fed_by_sub_sequence() -> Iterator[None]:
    """Go on to the next micro-batch at every first sub-sequence, and stay there."""
    from megatron.adaptor.step.batch_feed import BatchFeed

    select = BatchFeed.select

    def go_on(feed: Any, micro_batch: int) -> None:
        select(feed, max(micro_batch, feed._num_begun - 1))

    with patch.object(BatchFeed, "select", go_on):
        yield


PUT_BACK: dict[str, Callable[[], Any]] = {
    fault.__name__: fault
    for fault in (
        batches_not_contiguous,
        losses_by_sub_sequence,
        padding_in_the_z_loss,
        one_key_for_two_losses,
        only_the_second_dimension_is_cut,
        masks_unread,
        fed_by_sub_sequence,
    )
}


def difference_with(fault: str, situation: Situation) -> float | str:
    """Return the error of ``situation`` with a fault put back, or what it raises."""
    from megatron.adaptor import install

    install()
    try:
        with PUT_BACK[fault]():
            return difference(situation)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
