"""Padding, splitting, and labels that are shifted once."""

import copy
import pickle

import pytest
import torch

from seq1f1b.ulysses import (
    init_sequence_parallel,
    pad_for_sequence_parallel,
    shift_labels,
    split_for_sequence_parallel,
)
from seq1f1b.ulysses.batch import positions_of
from seq1f1b.ulysses.labels import ShiftedLabels

LENGTH = 10


@pytest.fixture(autouse=True)
def alone() -> None:
    init_sequence_parallel(1)


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.arange(3, 3 + 2 * LENGTH).view(2, LENGTH)
    positions = torch.cat([torch.arange(6), torch.arange(4)]).expand(2, LENGTH)
    return ids, ids.clone(), positions


def test_split_shifts_labels_and_ends_each_document():
    ids, labels, positions = rows()
    labels[0, 2] = -100
    _, targets, _ = split_for_sequence_parallel(ids, labels, positions)
    assert targets[0].tolist() == [4, -100, 6, 7, 8, -100, 10, 11, 12, -100]
    assert (targets != -100).sum() == 2 * 8 - 1


def test_split_finds_documents_by_cumulative_lengths():
    ids, labels, _ = rows()
    bounds = torch.tensor([0, 3, 10])
    _, targets, positions = split_for_sequence_parallel(ids[:1], labels[:1], cu_seqlens=bounds)
    assert targets[0].tolist() == [4, 5, -100, 7, 8, 9, 10, 11, 12, -100]
    assert positions[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def test_positions_behind_the_last_document_are_zero():
    assert positions_of(torch.tensor([0, 2, 5]), 7).tolist() == [[0, 1, 0, 1, 2, 0, 0]]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.to(torch.long),
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x[:1],
        lambda x: x.chunk(2)[0],
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_labels_stay_marked_when_they_are_moved(move):
    _, targets, _ = split_for_sequence_parallel(*rows())
    assert isinstance(move(targets), ShiftedLabels)


def test_what_is_computed_from_labels_is_a_plain_tensor():
    _, targets, _ = split_for_sequence_parallel(*rows())
    assert type(targets != -100) is torch.Tensor
    assert type((targets != -100).sum()) is torch.Tensor


def test_labels_are_shifted_once():
    targets = shift_labels(rows()[1])
    with pytest.raises(ValueError, match="shifted already"):
        shift_labels(targets)
    ids, _, positions = rows()
    again = split_for_sequence_parallel(ids, targets, positions)[1]
    assert again.tolist() == targets.tolist()


def test_pad_returns_what_it_was_given_where_nothing_is_missing():
    given = (*rows(), None)
    returned = pad_for_sequence_parallel(*given)
    assert returned[0] is given[0]
    assert returned[3] is None
    assert len(pad_for_sequence_parallel(*rows())) == 4


def test_pad_drops_the_label_behind_left_padding():
    ids, labels, positions = rows()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = pad_for_sequence_parallel(ids, labels, positions, mask)[1]
    assert padded[0, 3] == -100
    assert labels[0, 3] != -100
    assert (padded != labels).sum() == 1


def run_padded() -> list[object]:
    parallel = init_sequence_parallel(4)
    ids, labels, positions = rows()
    padded = pad_for_sequence_parallel(ids, labels, positions, None)
    shares = split_for_sequence_parallel(*padded[:3])
    one = pad_for_sequence_parallel(torch.ones(2, 3, LENGTH), padding_value=7.0, dim=-1)
    own = split_for_sequence_parallel(one, dim=-1, sp_group=parallel.group)
    return [[x.tolist() for x in padded], [x.tolist() for x in shares], one.shape, own.tolist()]


@pytest.mark.distributed
def test_ranks_pad_and_split_alike(workers):
    ids, labels, _ = rows()
    results = workers(4).run(run_padded)
    wanted = shift_labels(torch.nn.functional.pad(labels, (0, 2), value=-100), None)
    wanted[:, 5] = -100
    for rank, (padded, shares, shape, own) in enumerate(results):
        assert padded[0] == torch.nn.functional.pad(ids, (0, 2)).tolist()
        assert [row[-2:] for row in padded[1]] == [[-100, -100]] * 2
        assert [row[-2:] for row in padded[2]] == [[0, 0]] * 2
        assert padded[3] == [[1] * LENGTH + [0, 0]] * 2
        assert shares[1] == wanted[:, 3 * rank : 3 * rank + 3].tolist()
        assert tuple(shape) == (2, 3, 12)
        assert own == [[[7.0 if rank == 3 and i else 1.0 for i in range(3)]] * 3] * 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.ones(2, 4)}, "differ"),
        ({"position_ids": torch.ones(3, 2, LENGTH)}, "position_ids must be"),
        ({"attention_mask": torch.ones(2, 1, LENGTH, LENGTH)}, "pairs of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    ids, labels, positions = rows()
    given = {"labels": labels, "position_ids": positions, "attention_mask": None, **change}
    with pytest.raises(ValueError, match=message):
        pad_for_sequence_parallel(ids, **given)


def test_a_tensor_of_another_shape_needs_the_form_for_one_tensor():
    with pytest.raises(ValueError, match=r"split_for_sequence_parallel\(tensor, dim\)"):
        split_for_sequence_parallel(torch.ones(2, 3, 4))
