"""Compare a micro-batch in sub-sequences with the same one whole, in Megatron's own loop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from megatron.adaptor.reports.console import print_first
from megatron.adaptor.step.batch_feed import BatchItem
from megatron.adaptor.step.step import StepArguments
from seq1f1b.errors import Seq1F1BError

RELATIVE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
HALF_PRECISION_TOLERANCE = 2e-2


class VerificationError(Seq1F1BError, RuntimeError):
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
    """Run the first micro-batches in ``loop``, Megatron's, and in ``step``; all ranks must call.

    The data iterators of ``arguments`` deliver them again afterwards, and gradients are zero.
    Raises VerificationError when losses or gradient norms differ.
    """
    iterators = arguments.data_iterator
    listed = iterators if isinstance(iterators, list) else [iterators]
    rewound = [None if it is None else _Rewound(it) for it in listed]
    arguments.data_iterator = rewound if isinstance(iterators, list) else rewound[0]
    # Megatron's interleaved loop takes as many micro-batches at a time as there are stages.
    number = arguments.groups.pp.size() if len(arguments.chunks) > 1 else 1
    few = replace(arguments, num_microbatches=number)

    def rewind() -> None:
        for iterator in rewound:
            if iterator is not None:
                iterator.rewind()

    whole = _outcome(arguments, lambda: loop(**vars_of(few)))
    rewind()
    cut = _outcome(arguments, lambda: step(few))
    rewind()
    dtype = arguments.config.params_dtype
    tolerance = RELATIVE_TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE)
    text = (
        f"{number} micro-batch(es): report {_written(whole.report)} whole, {_written(cut.report)} "
        f"in sub-sequences; gradient norm {whole.gradient_norm:.6g} whole, "
        f"{cut.gradient_norm:.6g} in sub-sequences"
    )
    if not _agree(whole, cut, tolerance):
        raise VerificationError(
            f"--seq1f1b-verify: sub-sequences do not give what one split gives ({text}; allowed: "
            f"{tolerance:g} of the value): use --seq1f1b-splits 1"
        )
    print_first(f"> verified {text}")


class _Rewound:
    """An iterator that delivers what it has delivered again, after ``rewind``."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._seen: list[BatchItem] = []
        self._position = 0

    def __iter__(self) -> "_Rewound":
        return self

    def __next__(self) -> Any:
        if self._position == len(self._seen):
            self._seen.append(BatchItem(next(self._source), protect=True))
        self._position += 1
        return self._seen[self._position - 1].handed_out()

    def rewind(self) -> None:
        self._position = 0


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
