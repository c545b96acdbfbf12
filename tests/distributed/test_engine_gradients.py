"""Layers that keep gradients in transformer-engine's way, under every schedule."""

from dataclasses import replace

import pytest

from tests.distributed.families import LLAMA, RMS_NORM
from tests.distributed.gradient_checks import check
from tests.distributed.megatron_model import Case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

_CASE = Case(2, 3, 4, config=LLAMA, spec=RMS_NORM, engine=True)
_OVERLAPPED = {"overlap_grad_reduce": True}


def test_backwards_add_to_what_later_sub_sequences_have_left(workers):
    check(workers, 2, [_CASE, replace(_CASE, num_chunks=2), replace(_CASE, tied=True)])


@pytest.mark.parametrize("kind", ["zb-h1", "greedy"])
def test_weight_gradients_wait_for_their_action(workers, kind):
    split = replace(_CASE, kind=kind)
    cases = [split, replace(split, num_micro_batches=5), replace(split, num_splits=1)]
    if kind == "greedy":
        cases.append(replace(split, num_chunks=2))
    check(workers, 2, cases)


@pytest.mark.parametrize("kind", ["auto", "1f1b", "zb-h1"])
def test_reduction_of_a_weight_that_is_embedding_and_output(workers, kind):
    """Its gradient comes from two layers of one rank, of which one adds to the buffer itself."""
    tied = Case(1, 3, 1, kind=kind, positions="learned_absolute", tied=True, replicas=2)
    cases = [replace(tied, ddp=_OVERLAPPED)]
    if kind != "auto":
        cases.append(replace(tied, num_splits=3, ddp=_OVERLAPPED))
    check(workers, 2, cases)


@pytest.mark.parametrize("kind", ["1f1b", "zb-h1"])
def test_reduction_starts_with_the_last_gradient(workers, kind):
    check(workers, 4, [replace(_CASE, kind=kind, replicas=2, ddp=_OVERLAPPED)])
