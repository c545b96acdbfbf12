"""Masks are compared with the causal one without a second matrix of all pairs."""

import pytest
import torch

from megatron.adaptor.step import masks
from megatron.adaptor.step.masks import CausalMasks, MaskError, check_mask, is_causal
from seq1f1b.sequence import Documents
from tests.distributed.packed_data import block_mask


def causal(queries, keys):
    return torch.ones(queries, keys).triu(keys - queries + 1).bool()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(masks, "_ELEMENTS_AT_A_TIME", 40)


@pytest.mark.parametrize("queries, keys", [(1, 1), (9, 9), (30, 30), (4, 11), (1, 7)])
def test_causal_masks(queries, keys):
    mask = causal(queries, keys)
    assert is_causal(mask)
    assert is_causal(mask[None, None].expand(3, 2, -1, -1))


@pytest.mark.parametrize("row, column", [(0, 1), (5, 2), (29, 29), (17, 18)])
def test_one_pair_that_differs_is_found(row, column):
    mask = torch.stack([causal(30, 30)] * 2)[:, None]
    mask[1, 0, row, column] ^= True
    assert not is_causal(mask)


def test_other_masks_are_not_causal():
    assert not is_causal(causal(8, 8).float())
    assert not is_causal(torch.zeros(2, 1, 8, 8, dtype=torch.bool))
    assert not is_causal(causal(8, 4))


def test_documents():
    rows = [Documents.of_lengths([3, 5]), Documents.of_lengths([8])]
    mask = torch.stack([block_mask([3, 5]), block_mask([8])])
    check_mask(mask, rows)
    with pytest.raises(MaskError, match="is not causal within each document"):
        check_mask(mask.flip(0), rows)
    with pytest.raises(MaskError, match="is not causal, which"):
        check_mask(mask, None)
    with pytest.raises(MaskError, match="is not causal within each document"):
        check_mask(mask[:1], rows)


def test_a_known_mask_is_looked_at_again_for_other_documents():
    rows = [Documents.of_lengths([3, 5])]
    mask = block_mask([3, 5])[None]
    known = CausalMasks()
    assert known.is_causal(mask, None, rows)
    assert not known.is_causal(mask)
    assert not known.is_causal(mask, None, [Documents.of_lengths([4, 4])])
    assert known.is_causal(mask, None, rows)


def test_a_mask_is_looked_at_once_and_again_when_it_changes(monkeypatch):
    looked_at = []
    monkeypatch.setattr(
        masks, "is_causal", lambda mask, *rest: looked_at.append(mask) or is_causal(mask)
    )
    known = CausalMasks()
    mask = causal(8, 8)
    assert known.is_causal(mask)
    assert known.is_causal(mask.view(8, 8))
    assert len(looked_at) == 1
    mask[0, 5] = False
    assert not known.is_causal(mask)
    assert known.is_causal(causal(8, 8))
    assert len(looked_at) == 3
