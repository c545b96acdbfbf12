"""Compare a micro-batch in sub-sequences with the same one whole, in Megatron's own loop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from megatron.adaptor.step.step import StepArguments

RELATIVE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_PRECISION_TOLERANCE = 2e-2


class VerificationError(RuntimeError):
    """Sub-sequences do not give what one split gives."""


class Outcome(NamedTuple):
    """What a step reports, as numbers, and the norm of all gradients of all ranks."""

    report: list[float]
    gradient_norm: float


def verify(
    arguments: StepArguments,
    loop: Callable[..., list[Any]],
    step: Callable[[StepArguments], list[Any]],
) -> None:
    """Run the first micro-batch in ``loop``, Megatron's, and in ``step``; all ranks must call.

    The data iterators of ``arguments`` deliver the micro-batch again afterwards, and gradients are
    zero. Raises VerificationError when losses or gradient norms differ.
    """
    from megatron.training.utils import print_rank_0

    iterators = arguments.data_iterator
    has_list = isinstance(iterators, list)
    listed = iterators if has_list else [iterators]
    first = [None if it is None else next(it) for it in listed]

    def one_micro_batch() -> StepArguments:
        again = [
            None if it is None else iter([item]) for it, item in zip(listed, first, strict=True)
        ]
        return replace(arguments, data_iterator=again if has_list else again[0], num_microbatches=1)

    whole = _outcome(arguments, lambda: loop(**vars_of(one_micro_batch())))
    cut = _outcome(arguments, lambda: step(one_micro_batch()))
    restored = [
        None if it is None else chain([item], it) for it, item in zip(listed, first, strict=True)
    ]
    arguments.data_iterator = restored if has_list else restored[0]
    dtype = arguments.config.params_dtype
    tolerance = RELATIVE_TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE)
    text = (
        f"one micro-batch: report {_written(whole.report)} whole, {_written(cut.report)} in "
        f"sub-sequences; gradient norm {whole.gradient_norm:.6g} whole, {cut.gradient_norm:.6g} in "
        "sub-sequences"
    )
    if not _agree(whole, cut, tolerance):
        raise VerificationError(
            f"--seq1f1b-verify: sub-sequences do not give what one split gives ({text}; allowed: "
            f"{tolerance:g} of the value): use --seq1f1b-splits 1"
        )
    print_rank_0(f"> verified {text}")


def vars_of(arguments: StepArguments) -> dict[str, Any]:
    """Return what Megatron passes to its loops."""
    names = arguments.__dataclass_fields__
    return {name: getattr(arguments, name) for name in names}


def _outcome(arguments: StepArguments, run: Callable[[], list[Any]]) -> Outcome:
    reports = run()
    numbers = torch.tensor(
        [
            float(number)
            for leaf in pytree.tree_leaves(reports)
            for number in (leaf.flatten().tolist() if isinstance(leaf, Tensor) else [])
        ],
        dtype=torch.float64,
    )
    squares = sum(
        (shard.double().square().sum() for shard in _gradients(arguments.chunks)),
        start=torch.zeros([], dtype=torch.float64, device=torch.cuda.current_device()),
    )
    torch.distributed.all_reduce(squares)
    for chunk in arguments.chunks:
        chunk.zero_grad_buffer()
    _forget_logged()
    return Outcome(numbers.tolist(), math.sqrt(squares.item()))


def _gradients(chunks: list[Any]) -> Iterator[Tensor]:
    """Yield this rank's reduced gradients."""
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            for bucket in buffer.buckets:
                if chunk.ddp_config.use_distributed_optimizer:
                    group = buffer.data_parallel_group
                    yield shard_buffer(bucket.grad_data, group.size())[group.rank()]
                else:
                    yield bucket.grad_data


def _forget_logged() -> None:
    """Drop what layers have logged of the runs that are compared."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    get_moe_metrics_tracker().clear()
    MTPLossLoggingHelper.tracker.clear()


def _agree(whole: Outcome, cut: Outcome, tolerance: float) -> bool:
    """Whether all ranks find the same, within ``tolerance``."""
    same = len(whole.report) == len(cut.report) and all(
        math.isclose(a, b, rel_tol=tolerance)
        for a, b in zip(
            (*whole.report, whole.gradient_norm), (*cut.report, cut.gradient_norm), strict=True
        )
    )
    flag = torch.tensor([float(same)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def _written(numbers: list[float]) -> str:
    return ", ".join(f"{number:.6g}" for number in numbers) or "nothing on this rank"
