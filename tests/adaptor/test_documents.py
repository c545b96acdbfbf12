"""Where documents begin, from what each of Megatron's data sets says; and reading ahead."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.adaptor.step.batch_feed import BatchFeed
from megatron.adaptor.step.read_ahead import Packing, agree_on_documents

END = 7
SOURCES = ("cu_seqlens", "position_ids", "tokens")
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
NOT_FIRST = SimpleNamespace(rank=lambda: 1, size=lambda: 2)


def packing(source):
    return Packing("--some-flag", source, lambda: END)


def sample(tokens):
    """Return a sample as GPTDataset makes it, its positions and mask by Megatron's own code."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    mask, _, positions = _get_ltor_masks_and_position_ids(tokens, END, True, True, True, True)
    ends = [0, *(torch.nonzero(tokens[:-1] == END).flatten() + 1).tolist(), len(tokens)]
    bounds = torch.full((len(tokens) + 1,), len(tokens), dtype=torch.int32)
    bounds[: len(ends)] = torch.tensor(ends)
    return {"tokens": tokens, "position_ids": positions, "cu_seqlens": bounds, "mask": mask[0]}


def batch_of(rows):
    samples = [sample(torch.tensor(row)) for row in rows]
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


@given(st.integers(1, 3), st.lists(st.sampled_from([1, 2, END]), min_size=1, max_size=30))
def test_every_source_finds_the_documents_of_megatrons_mask(num_rows, row):
    batch = batch_of([row[i % len(row) :] + row[: i % len(row)] for i in range(num_rows)])
    # A token starts a document when it does not see the one before.
    seen = ~batch["mask"]
    expected = torch.ones(num_rows, len(row), dtype=torch.bool)
    expected[:, 1:] = ~torch.diagonal(seen, offset=-1, dim1=1, dim2=2)
    for source in SOURCES:
        assert torch.equal(packing(source).starts(batch, num_rows, len(row)), expected)


def test_a_batch_that_does_not_say_is_refused():
    batch = {"text": torch.zeros(1, 4), "labels": torch.zeros(1, 4)}
    message = "--some-flag: documents are told apart by 'tokens', and the micro-batch has only labe"
    with pytest.raises(ValueError, match=message):
        packing("tokens").starts(batch, 1, 4)


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_of_another_shape_is_refused(source):
    batch = batch_of([[1, 2, END, 1]] * 2)
    with pytest.raises(ValueError, match=rf"'{source}' of a micro-batch has shape \[2, \d\]; it"):
        packing(source).starts(batch, 3, 4)


def test_a_first_stage_without_data_is_refused():
    groups = SimpleNamespace(tp=ALONE, pp=ALONE)
    with pytest.raises(ValueError, match="the first stage has no data to find documents in"):
        agree_on_documents(
            packing("tokens"), None, groups, num_micro_batches=1, num_rows=1, total=4
        )


def test_reading_ahead_changes_nothing_for_scripts():
    given = [{"tokens": number, "cu_seqlens": 5} for number in range(5)]
    feed = BatchFeed(iter(given), hidden=packing("cu_seqlens").hidden)
    seen = []
    for number in (3, 2):
        ahead = feed.read_ahead(number)
        assert ahead == given[len(seen) : len(seen) + number]
        for _ in range(number):
            micro_batch = len(seen)
            feed.select(micro_batch)
            first = next(feed)
            first.pop("tokens")
            feed.select(micro_batch)
            seen.append(next(feed))
    assert seen == [{"tokens": number, "cu_seqlens": None} for number in range(5)]
