"""Gradients of packed documents through Megatron-Core against one rank with the explicit mask."""

import itertools
from dataclasses import replace

import pytest

from tests.distributed.gradient_checks import check
from tests.distributed.megatron_model import Case
from tests.selection import mostly_long

pytestmark = pytest.mark.distributed

SOURCES = ("cu_seqlens", "position_ids", "tokens")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_stages", mostly_long([1, 2, 4], default=[2]))
def test_every_stage_attends_within_documents(workers, num_stages):
    shapes = itertools.product((2, 3), ("average", "uniform_comp"), SOURCES)
    cases = [Case(num_stages, 5, s, balance, documents=source) for s, balance, source in shapes]
    check(workers, num_stages, cases)


@pytest.mark.timeout(400)
def test_every_feature(workers):
    plain = Case(2, 3, 3, documents="position_ids")
    features = (
        {"positions": "learned_absolute", "tied": True},
        {"recompute": True},
        {"loss": "mean"},
        {"per_token": True},
        {"num_splits": 1},
        {"num_splits": 1, "recompute": True},
        {"num_chunks": 2, "num_micro_batches": 4},
        {"num_splits": 30},
        {"kind": "zb-h1"},
        {"experts": "seq_aux_loss"},
        {"kind": "greedy", "num_chunks": 2, "num_micro_batches": 4},
    )
    check(workers, 2, [replace(plain, **feature) for feature in features])
