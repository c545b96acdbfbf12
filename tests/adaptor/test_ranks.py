"""Ranks that were started with different arguments say which, before they wait for each other."""

import re

import pytest
import torch.distributed as dist

from megatron.adaptor.ranks import RanksDifferError, check_same

SAME = {"seq1f1b_splits": "4", "seed": "1234"}


def message(changes):
    """Compare this rank's arguments, with its changes, and return the refusal."""
    try:
        check_same(SAME | changes.get(dist.get_rank(), {}))
    except RanksDifferError as error:
        return str(error)
    return None


def test_equal_ranks_pass(workers):
    assert workers(4).run(message, {}) == [None] * 4


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({2: {"seq1f1b_splits": "3"}}, "--seq1f1b-splits is 4 on ranks 0, 1, 3, 3 on rank 2"),
        ({0: {"seed": "5"}}, "--seed is 5 on rank 0, 1234 on ranks 1, 2, 3"),
        ({3: {"more": "1"}}, "--more is not there on ranks 0, 1, 2, 1 on rank 3"),
        ({1: {"version of torch": "2.0"}}, "version of torch is not there on ranks 0, 2, 3, 2.0"),
    ],
)
def test_every_rank_names_flag_ranks_and_values(workers, changes, expected):
    for found in workers(4).run(message, changes):
        assert re.search(re.escape(expected), found), found
