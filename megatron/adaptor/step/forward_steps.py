"""A script's forward step, called for sub-sequences, and for the loss on the whole micro-batch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.adaptor.step.batch_feed import BatchCutter, BatchFeed
from megatron.adaptor.step.loss import LossError, Losses
from megatron.adaptor.step.model_calls import ModelCall, answered, observed
from megatron.adaptor.step.repetition import (
    DrawWatch,
    InputComparison,
    RepetitionError,
    check_same_loss,
    copied,
)
from seq1f1b.runtime import ExecutionContext
from seq1f1b.schedule import Action
from seq1f1b.sequence import SubSequence

ForwardStep = Callable[..., Any]


class _BatchIsWholeError(Exception):
    """A forward step calls its model with a batch that nothing has cut."""


class ForwardSteps:
    """What Megatron calls in place of a script's ``forward_step`` in the actions of one step.

    feeds: data of each model chunk. cuts: sub-sequences of each micro-batch. batch_groups: whose
    ranks share a batch. is_checked: whether to find out that repeated calls do the same, and who
    cuts batches, which is done in the first step of a kind.
    """

    def __init__(
        self,
        script: ForwardStep,
        context: ExecutionContext,
        cutter: BatchCutter,
        losses: Losses,
        feeds: Sequence[BatchFeed | None],
        cuts: Sequence[Sequence[SubSequence]],
        *,
        context_group: Any,
        batch_groups: Sequence[Any],
        trains: bool,
        is_checked: bool,
    ) -> None:
        self._script, self._context, self._cutter = script, context, cutter
        self._losses, self._feeds, self._cuts = losses, feeds, cuts
        self._context_group, self._trains, self._is_checked = context_group, trains, is_checked
        self._batch_groups = batch_groups
        self._undecided = set(range(len(feeds))) if is_checked else set()
        for chunk, feed in enumerate(feeds):
            if feed is not None:
                feed.cut = partial(self._cut_item, (trains, chunk))
        self._inputs: dict[tuple[int, int], list[ModelCall]] = {}
        self._comparison = InputComparison()

    def of(self, action: Action, *, is_last_stage: bool) -> ForwardStep:
        """Return the forward step of ``action``; call it inside the running action."""
        part = self._cuts[action.micro_batch][action.sub_sequence]
        if part.is_whole:
            return self._script

        def forward_step(iterator: Any, model: Any, *others: Any) -> Any:
            output, loss_function, call = self._call(action, iterator, model, others)
            if is_last_stage:
                return self._on_last_stage(
                    action, part, iterator, model, others, loss_function, call
                )
            if self._is_checked:
                self._check_inputs(action, part, iterator, model, others, call)
            return output, loss_function

        return forward_step

    def check(self) -> None:
        """Raise RepetitionError if a call of this step differed from the others."""
        self._comparison.check()

    def _call(
        self, action: Action, iterator: Any, model: Any, others: tuple[Any, ...]
    ) -> tuple[Any, Any, ModelCall]:
        """Call the script for one sub-sequence; its model must be called exactly once."""
        if action.chunk in self._undecided:
            self._undecided.discard(action.chunk)
            self._cutter.in_feed.discard((self._trains, action.chunk))
            try:
                return self._observe(action, iterator, model, others, decides=True)
            except _BatchIsWholeError:
                self._cutter.in_feed.add((self._trains, action.chunk))
                feed = self._feeds[action.chunk]
                if feed is not None:
                    feed.select(action.micro_batch)
        return self._observe(action, iterator, model, others)

    def _observe(
        self,
        action: Action,
        iterator: Any,
        model: Any,
        others: tuple[Any, ...],
        *,
        decides: bool = False,
    ) -> tuple[Any, Any, ModelCall]:
        # Data is loaded in the first call, and loading may draw random numbers.
        watch = DrawWatch() if self._is_checked and action.sub_sequence > 0 else None

        def boundary() -> None:
            nonlocal decides
            if watch:
                watch.boundary()
            if decides:
                decides = False
                self._check_is_cut(action.chunk)

        with observed(model, boundary) as calls:
            output, loss_function = self._script(iterator, model, *others)
        if watch:
            watch.finish()
        if len(calls) != 1:
            raise RepetitionError(
                f"the forward step calls its model {len(calls)} times; with sub-sequences, whose "
                "keys and values are carried from call to call, it must be once: use "
                "--seq1f1b-splits 1"
            )
        return output, loss_function, calls[0]

    def _check_is_cut(self, chunk: int) -> None:
        """Raise _BatchIsWholeError on all ranks that share a batch if one has it uncut."""
        feed = self._feeds[chunk]
        is_whole = feed is not None and feed.was_read and not self._cutter.was_asked
        flag = torch.tensor([float(is_whole)], device=torch.cuda.current_device())
        for group in self._batch_groups:
            if group.size() > 1:
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=group)
        if flag.item():
            raise _BatchIsWholeError

    def _cut_item(self, kind: tuple[bool, int], item: Any) -> Any:
        return self._cutter.cut_item(item) if kind in self._cutter.in_feed else item

    def _on_last_stage(
        self,
        action: Action,
        part: SubSequence,
        iterator: Any,
        model: Any,
        others: tuple[Any, ...],
        loss_function: Any,
        call: ModelCall,
    ) -> tuple[Any, Any]:
        micro_batch = action.micro_batch
        if loss_function is None and self._trains:
            raise LossError(
                "the forward step returns no loss function; with sub-sequences it must return the "
                "model's outputs and a function of them: use --seq1f1b-splits 1"
            )
        start = self._losses.add(micro_batch, call)
        if not part.is_last:
            return start, _nothing_yet
        calls = self._losses.calls(micro_batch)
        joined = self._losses.join(micro_batch, self._cuts[micro_batch])
        if loss_function is None:
            self._losses.drop(micro_batch)
            return joined, None
        if self._is_checked:
            with torch.no_grad():
                output, of_output = self._call_whole(action, iterator, model, others, calls, joined)
                seen = copied(of_output(output)) if self._trains else None
        output, of_output = self._call_whole(action, iterator, model, others, calls, joined)

        def whole_loss(_: Tensor, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                self._losses.drop(micro_batch)
                return of_output(output, non_loss_data=True)
            outputs = of_output(output)
            if self._is_checked and self._trains:
                check_same_loss(seen, copied(outputs))
            loss = self._losses.finish(micro_batch, outputs)
            return start, self._losses.counted(loss), loss.report

        return start, whole_loss

    def _call_whole(
        self,
        action: Action,
        iterator: Any,
        model: Any,
        others: tuple[Any, ...],
        calls: Sequence[ModelCall],
        answer: Any,
    ) -> tuple[Any, Any]:
        """Call the script for the uncut batch, with a model that returns ``answer``.

        Its inputs are compared with those of the sub-sequences' ``calls``.
        """
        feed = self._feeds[action.chunk]
        if feed is not None:
            feed.select(action.micro_batch)
        watch = DrawWatch() if self._is_checked else None
        with self._context.uncut(), answered(model, answer) as of_whole:
            output, loss_function = self._script(iterator, model, *others)
        if watch:
            watch.finish()
        if len(of_whole) != 1:
            raise RepetitionError(
                f"the forward step calls its model {len(of_whole)} times when it is called again: "
                "it must be once, or use --seq1f1b-splits 1"
            )
        self._comparison.add(
            model,
            calls,
            of_whole[0],
            self._cuts[action.micro_batch],
            self._context_group,
            micro_batch=action.micro_batch,
        )
        return output, loss_function

    def _check_inputs(
        self,
        action: Action,
        part: SubSequence,
        iterator: Any,
        model: Any,
        others: tuple[Any, ...],
        call: ModelCall,
    ) -> None:
        """On a stage without loss: compare inputs, for which the outputs need not be kept."""
        calls = self._inputs.setdefault(action[1:3], [])
        calls.append(ModelCall(call.args, call.kwargs, None))
        if part.is_last:
            self._call_whole(action, iterator, model, others, calls, call.output)
            del self._inputs[action[1:3]]


def _nothing_yet(start: Tensor, non_loss_data: bool = False) -> Any:
    """Stand for the loss function until all sub-sequences of a micro-batch are there."""
    return None if non_loss_data else (start, torch.zeros([], dtype=torch.int), None)
