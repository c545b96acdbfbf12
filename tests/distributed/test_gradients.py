"""Gradients of every schedule against plain autograd in one process, in float64."""

import itertools

import pytest
import torch.distributed as dist

from seq1f1b.runtime import (
    ALL_CHANNELS,
    ActionClock,
    ExecutionContext,
    PointToPoint,
    StagedPointToPoint,
    execute,
)
from seq1f1b.schedule import Schedule, gpipe, interleaved, lower, one_f_one_b, zb_h1
from seq1f1b.sequence import partition, sub_sequences
from seq1f1b.simulate import Costs, greedy
from tests.selection import mostly_long
from tests.tiny_model import (
    COST,
    HIDDEN,
    ModelPart,
    TinyComputation,
    micro_batches,
    reference,
)

LENGTH = 29
BATCH = 2


def run_schedule(
    schedule: Schedule,
    method: str,
    length: int = LENGTH,
    kind: type[PointToPoint] = PointToPoint,
) -> tuple[float, float]:
    """Run one step on this rank; return the worst relative gradient error and the loss error."""
    stage = dist.get_rank()
    schedule = lower(schedule)
    data = micro_batches(schedule.num_micro_batches, length, BATCH)
    lengths = partition(length, schedule.num_splits, method=method, cost=COST)
    parts = [sub_sequences(lengths)] * len(data)
    num_parts = schedule.num_stages * schedule.num_chunks
    indices = range(stage, num_parts, schedule.num_stages)
    context = ExecutionContext()
    chunks = [ModelPart(index, num_parts, length, context) for index in indices]
    computation = TinyComputation(chunks, data, parts, context)
    transport = kind(
        schedule,
        stage,
        ranks=range(schedule.num_stages),
        groups=dict.fromkeys(ALL_CHANNELS, dist.group.WORLD),
        shape=lambda action: (lengths[action.sub_sequence], BATCH, HIDDEN),
        dtype=chunks[0].layers[0].out.weight.dtype,
        device="cpu",
    )
    execute(
        schedule.stages[stage], computation, transport, context, parts, ActionClock(), stage=stage
    )
    loss, wanted = reference(num_parts, data)
    worst = 0.0
    for index, chunk in zip(indices, chunks, strict=True):
        for (name, got), want in zip(
            chunk.named_parameters(), wanted[index].parameters(), strict=True
        ):
            assert got.grad is not None, name
            error = (got.grad - want.grad).abs().max() / want.grad.abs().max()
            worst = max(worst, error.item())
    if chunks[-1].is_last:
        return worst, abs(sum(computation.losses.values()) - loss) / loss
    return worst, 0.0


def run_grid(num_stages: int, method: str) -> list[tuple[tuple[int, int], float, float]]:
    return [
        ((m, s), *run_schedule(one_f_one_b(num_stages, m, s), method))
        for m, s in itertools.product((1, 2, 3, 5), (1, 2, 3, 4, 7))
    ]


@pytest.mark.parametrize(
    "method", mostly_long(["average", "uniform_comp"], default=["uniform_comp"])
)
@pytest.mark.parametrize("num_stages", mostly_long([1, 2, 4], default=[2]))
def test_gradients_equal_single_process_autograd(workers, num_stages, method):
    for results in workers(num_stages).run(run_grid, num_stages, method):
        assert len(results) == 20
        for case, gradient_error, loss_error in results:
            assert gradient_error < 1e-10, case
            assert loss_error < 1e-10, case


def run_interleaved(num_stages: int) -> list[tuple[tuple[int, int], float, float]]:
    return [
        ((m, s), *run_schedule(interleaved(num_stages, 2, m, s), "uniform_comp"))
        for m, s in itertools.product((2, 3, 4, 8), (1, 2, 3, 4))
    ]


def run_gpipe(num_stages: int) -> list[tuple[tuple[int, int], float, float]]:
    return [((3, s), *run_schedule(gpipe(num_stages, 3, s), "average")) for s in (1, 4)]


def run_zb_h1(num_stages: int) -> list[tuple[tuple[int, int], float, float]]:
    return [
        ((m, s), *run_schedule(zb_h1(num_stages, m, s), "average"))
        for m, s in itertools.product((2, 3, 4, 8), (1, 2, 3, 4))
    ]


def run_staged(num_stages: int) -> list[tuple[tuple[int, int], float, float]]:
    schedule = interleaved(num_stages, 2, 3, 4)
    return [((3, 4), *run_schedule(schedule, "uniform_comp", kind=StagedPointToPoint))]


def run_greedy(num_stages: int) -> list[tuple[tuple[int, int, int], float, float]]:
    results = []
    for v, m, s in itertools.product((1, 2), (2, 3, 4, 8), (1, 2, 3, 4)):
        lengths = partition(LENGTH, s, method="uniform_comp", cost=COST)
        shape = interleaved(num_stages, v, m, s)
        costs = Costs.of_tokens(shape, COST, lengths, flops_per_second=1.0)
        schedule = greedy(num_stages, v, m, s, costs)
        results.append(((v, m, s), *run_schedule(schedule, "uniform_comp")))
    return results


@pytest.mark.parametrize("num_stages", mostly_long([2, 4], default=[2]))
@pytest.mark.parametrize(
    "run",
    mostly_long(
        [run_interleaved, run_gpipe, run_zb_h1, run_greedy, run_staged],
        default=[run_interleaved, run_gpipe, run_zb_h1, run_staged],
    ),
)
def test_gradients_of_other_schedules(workers, num_stages, run):
    for results in workers(num_stages).run(run, num_stages, timeout=240):
        for case, gradient_error, loss_error in results:
            assert gradient_error < 1e-10, case
            assert loss_error < 1e-10, case
