"""Gradients of Seq1F1B through Megatron-Core against the whole model on one rank, in float32."""

import itertools
from dataclasses import replace

import pytest

from tests.distributed.gradient_checks import check
from tests.distributed.megatron_model import Case
from tests.selection import mostly_long

pytestmark = pytest.mark.distributed


@pytest.mark.timeout(400)
@pytest.mark.parametrize("balance", mostly_long(["average", "uniform_comp"], default=["average"]))
@pytest.mark.parametrize("num_stages", mostly_long([1, 2, 4], default=[2]))
def test_every_shape(workers, num_stages, balance):
    shapes = itertools.product((1, 2, 3, 5), (2, 3, 4, 7))
    check(workers, num_stages, [Case(num_stages, m, s, balance) for m, s in shapes])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_every_feature(workers, num_stages):
    plain = Case(num_stages, 3, 4)
    features = (
        {"positions": "learned_absolute", "tied": True},
        {"recompute": True},
        {"loss": "mean"},
        {"per_token": True},
        {"num_splits": 1},
    )
    check(workers, num_stages, [replace(plain, **feature) for feature in features])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_stages", mostly_long([2, 4], default=[2]))
@pytest.mark.parametrize("kind", mostly_long(["1f1b", "zb-h1", "greedy"], default=["zb-h1"]))
def test_every_schedule(workers, num_stages, kind):
    chunks = (1,) if kind == "zb-h1" else (2,) if kind == "1f1b" else (1, 2)
    shapes = itertools.product((2, 3, 4, 8), (1, 2, 3, 4), chunks)
    cases = [
        Case(num_stages, m, s, num_chunks=v, kind=kind, length=24, layers=2 * num_stages)
        for m, s, v in shapes
    ]
    check(workers, num_stages, cases)


@pytest.mark.timeout(400)
def test_split_backwards_with_every_feature(workers):
    plain = Case(2, 3, 4, kind="zb-h1")
    features = (
        {"positions": "learned_absolute", "tied": True},
        {"recompute": True},
        {"per_token": True},
    )
    check(workers, 2, [replace(plain, **feature) for feature in features])


@pytest.mark.timeout(400)
def test_experts_and_their_losses(workers):
    """The losses that balance experts are those of whole micro-batches, to rounding."""
    plain = Case(2, 3, 4, experts="aux_loss")
    others = (
        {},
        {"experts": "none"},
        {"experts": "seq_aux_loss"},
        {"per_token": True},
        {"recompute": True},
        {"kind": "zb-h1"},
        {"num_chunks": 2, "kind": "greedy"},
    )
    check(workers, 2, [replace(plain, **other) for other in others])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_stages", mostly_long([1, 2, 4], default=[2]))
def test_lengths_that_differ_between_micro_batches(workers, num_stages):
    plain = Case(num_stages, 4, 3, length=40, lengths=(17, 40, 12, 31))
    others = (
        {},
        {"positions": "learned_absolute", "tied": True},
        {"kind": "greedy"},
        {"kind": "zb-h1", "num_splits": 1},
    )
    cases = [replace(plain, **other) for other in others]
    if num_stages == 2:
        cases.append(replace(plain, num_chunks=2))
    check(workers, num_stages, cases)
