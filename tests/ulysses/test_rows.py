"""Where documents lie, and which interval of its row each token sees."""

import pytest
import torch

from seq1f1b.ulysses.rows import LayoutError, Pattern, Rows


def places(*documents: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in documents])[None]


def brute_force(rows: Rows, pattern: Pattern) -> torch.Tensor:
    """Return who sees whom, ``[b, s, s]``, from documents and padding token by token."""
    b, s = rows.positions.shape
    seen = torch.zeros(b, s, s, dtype=torch.bool)
    for row in range(b):
        for q in range(s):
            for k in range(q + 1):
                start = int(rows.starts[row, q])
                near = pattern.window is None or k > q - pattern.window
                chunk = pattern.chunk or s
                together = (k - start) // chunk == (q - start) // chunk
                seen[row, q, k] = start <= k and near and together
    return seen


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(window=3), Pattern(chunk=4), Pattern(window=2, chunk=5)]
)
def test_intervals_say_who_sees_whom(pattern):
    rows = Rows.read(torch.cat([places(5, 7, 4), places(16)]))
    first = rows.first(pattern)
    keys = torch.arange(16)
    interval = (keys >= first[..., None]) & (keys <= keys[:, None])
    assert torch.equal(interval, brute_force(rows, pattern))
    pairs = interval.sum(dim=(0, 2)).cumsum(0)
    assert rows.costs(pattern).tolist() == [0, *pairs.tolist()]


def test_documents_begin_where_positions_do_not_rise():
    rows = Rows.read(places(3, 1, 4))
    assert rows.starts.tolist() == [[0, 0, 0, 3, 4, 4, 4, 4]]
    assert rows.num_documents.tolist() == [3]
    assert rows.longest == 4


@pytest.mark.parametrize("left", [[1, 1, 1], [0, 0, 0], [0, 1, 2]])
def test_left_padding_stands_apart(left):
    positions = torch.tensor([[*left, *range(left[-1] + 1 if left[-1] == 2 else 0, 8)][:8]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    rows = Rows.read(positions, mask)
    assert rows.starts[0, 3:].tolist() == [3] * 5
    assert not rows.has_holes
    assert rows.num_documents.tolist() == [1]
    assert rows.segments(Pattern(), 0) == [(3, 8)]


def test_right_padding_stands_apart():
    rows = Rows.read(torch.tensor([[0, 1, 2, 0, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0, 0]]))
    assert rows.segments(Pattern(), 0) == [(0, 3), (3, 5)]
    assert rows.num_documents.tolist() == [2]
    assert not rows.has_holes


def test_padding_within_a_document_is_a_hole():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    for positions in ([0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 2, 3]):
        rows = Rows.read(torch.tensor([positions]), mask)
        assert rows.has_holes
        assert rows.starts.tolist() == [[0] * 6]
    restarted = Rows.read(torch.tensor([[0, 1, 0, 0, 0, 1]]), mask)
    assert not restarted.has_holes
    assert restarted.num_documents.tolist() == [2]


def test_cumulative_lengths_win_over_positions():
    rows = Rows.read(torch.arange(6)[None], None, torch.tensor([0, 2, 6]))
    assert rows.starts.tolist() == [[0, 0, 2, 2, 2, 2]]


def test_positions_that_jump_are_refused():
    with pytest.raises(LayoutError, match="row 1, at token 3"):
        Rows.read(torch.tensor([[0, 1, 2, 3], [0, 1, 2, 9]]))
    with pytest.raises(LayoutError, match="row 0, at token 2"):
        Rows.read(torch.tensor([[0, 1, 5, 6]]), torch.tensor([[1, 1, 1, 0]]))


@pytest.mark.parametrize("bounds", [[1, 4], [0, 3, 3], [0, 9], [0]])
def test_bad_cumulative_lengths_are_refused(bounds):
    with pytest.raises(LayoutError, match="cu_seqlens must rise"):
        Rows.read(torch.arange(6)[None], None, torch.tensor(bounds))


def test_a_window_that_no_document_feels_is_dropped():
    rows = Rows.read(places(5, 3))
    assert rows.simplify(Pattern(window=5, chunk=4)) == Pattern(chunk=4)
    assert rows.simplify(Pattern(window=4)) == Pattern(window=4)
