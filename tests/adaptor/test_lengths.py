"""What the first stage must be able to say when lengths differ between micro-batches."""

from types import SimpleNamespace

import pytest
import torch

from megatron.adaptor.step.batch_feed import BatchFeed
from megatron.adaptor.step.read_ahead import agree_on_lengths


class Alone:
    """A process group of one rank."""

    def rank(self):
        return 0

    def size(self):
        return 1


GROUPS = SimpleNamespace(tp=Alone(), pp=Alone())


def test_lengths_are_read_ahead_and_micro_batches_come_again():
    batches = [{"tokens": torch.zeros(2, length)} for length in (5, 9, 7)]
    replay = BatchFeed(iter(batches))
    assert agree_on_lengths(replay, GROUPS, num_micro_batches=2) == [5, 9]
    assert next(replay)["tokens"].shape == (2, 5)


@pytest.mark.parametrize(
    "replay", [None, BatchFeed(iter([[1, 2]])), BatchFeed(iter([{"text": 1}]))]
)
def test_data_that_does_not_say(replay):
    with pytest.raises(ValueError, match=r"must give dicts with 'tokens' or 'input_ids' \[b, s\]"):
        agree_on_lengths(replay, GROUPS, num_micro_batches=1)
