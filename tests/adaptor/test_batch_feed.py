"""A micro-batch is handed out as often as asked, unchanged, in any order."""

import pytest
import torch

from megatron.adaptor.step.batch_feed import BatchFeed, DataError, sequence_dim


def batches(number):
    return iter([{"tokens": torch.full((1, 4), n), "hidden": n} for n in range(number)])


def value(batch):
    return int(batch["tokens"][0, 0])


def test_the_selected_micro_batch_is_repeated():
    feed = BatchFeed(batches(3), hidden=["hidden"])
    seen = []
    for micro_batch in (0, 1, 0, 2, 1, 0):
        feed.select(micro_batch)
        batch = next(feed)
        seen.append(value(batch))
        assert batch["hidden"] is None
    assert seen == [0, 1, 0, 2, 1, 0]


def test_micro_batches_may_begin_out_of_order():
    feed = BatchFeed(batches(3))
    seen = []
    for micro_batch in (2, 0, 1):
        feed.select(micro_batch)
        seen.append(value(next(feed)))
    assert seen == [2, 0, 1]


def test_several_items_of_a_micro_batch_are_repeated_in_order():
    feed = BatchFeed(batches(4))
    seen = []
    for micro_batch in (0, 0, 1, 1):
        feed.select(micro_batch)
        seen.append((value(next(feed)), value(next(feed))))
    assert seen == [(0, 1), (0, 1), (2, 3), (2, 3)]


def test_a_later_sub_sequence_may_not_fetch_more():
    feed = BatchFeed(batches(4))
    feed.select(0)
    next(feed)
    feed.select(0)
    next(feed)
    with pytest.raises(DataError, match=r"fetched 1 item\(s\) for the first sub-sequence"):
        next(feed)


def test_changes_in_place_do_not_last():
    feed = BatchFeed(batches(1))
    for _ in range(3):
        feed.select(0)
        batch = next(feed)
        assert value(batch) == 0
        batch["tokens"].add_(1)
        batch["more"] = batch.pop("tokens")


def test_tensors_that_share_memory_change_together():
    text = torch.arange(5)
    feed = BatchFeed(iter([{"tokens": text[:-1], "labels": text[1:]}]))
    for _ in range(3):
        feed.select(0)
        batch = next(feed)
        batch["tokens"].clamp_(max=2)
        assert batch["tokens"].tolist() == [0, 1, 2, 2]
        assert batch["labels"].tolist() == [1, 2, 2, 4]


def test_a_mask_that_is_changed_in_place_is_refused():
    feed = BatchFeed(iter([{"attention_mask": torch.zeros(1, 1, 4, 4)}]))
    feed.select(0)
    next(feed)["attention_mask"].fill_(1)
    feed.select(0)
    with pytest.raises(DataError, match="changes an attention mask of its batch in place"):
        next(feed)


def test_data_that_end_inside_a_step():
    feed = BatchFeed(batches(2))
    for micro_batch in (0, 1):
        feed.select(micro_batch)
        next(feed)
    feed.select(2)
    with pytest.raises(DataError, match="the data iterator ended before micro-batch"):
        next(feed)
    with pytest.raises(DataError, match="the data iterator ended before micro-batch"):
        BatchFeed(batches(1)).read_ahead(2)


@pytest.mark.parametrize(
    "shape, dim",
    [
        ([2, 8], 1),
        ([8, 8], 1),
        ([2, 8, 5], 1),
        ([3, 2, 8], 2),
        ([8, 2, 5], 0),
        ([8], 0),
        ([2, 5], None),
        ([], None),
    ],
)
def test_the_dimension_of_the_sequence(shape, dim):
    assert sequence_dim(shape, 8, name="x") == dim


def test_a_tensor_of_pairs_cannot_be_cut():
    with pytest.raises(ValueError, match="'bias' of the batch has shape"):
        sequence_dim([2, 1, 8, 8], 8, name="bias")
