"""Documents in a sequence: which of them a sub-sequence holds, what tokens cost, where to cut."""

import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seq1f1b.sequence import (
    Documents,
    PackedCost,
    TokenCost,
    imbalance,
    partition,
    sub_sequences,
)

LLAMA_7B = TokenCost.of_transformer(num_layers=32, hidden_size=4096, num_attention_heads=32)
SMALL = TokenCost(linear=30.0, attention=2.0)
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@st.composite
def packed(draw: st.DrawFn) -> tuple[list[list[int]], tuple[int, ...]]:
    """Draw the document lengths of some rows of equal length, and a cut of them."""
    total = draw(st.integers(8, 300))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        starts = draw(st.sets(st.integers(1, total - 1), max_size=10))
        ends = [0, *sorted(starts), total]
        rows.append([b - a for a, b in pairwise(ends)])
    return rows, partition(total, draw(st.integers(1, 8)))


def operations(cost, rows, start, stop):
    """Count one token after the other."""
    total = 0.0
    for lengths in rows:
        depth = [place + 1 for length in lengths for place in range(length)]
        total += math.fsum(cost.linear + cost.attention * d for d in depth[start:stop])
    return total


@given(packed())
def test_pieces_cover_a_sub_sequence_token_by_token(drawn):
    (lengths, *_), cuts = drawn
    documents = Documents.of_lengths(lengths)
    owner = [(n, place, length) for n, length in enumerate(lengths) for place in range(length)]
    for part in sub_sequences(cuts):
        covered = [
            (number, place, piece.total)
            for number, piece in documents.pieces(part)
            for place in range(piece.start, piece.stop)
        ]
        assert covered == owner[part.start : part.stop]


@given(packed())
def test_only_documents_that_a_cut_runs_through_are_carried(drawn):
    (lengths, *_), cuts = drawn
    parts = sub_sequences(cuts)
    part_of = [part.index for part in parts for _ in range(part.length)]
    start = expected = 0
    for length in lengths:
        if part_of[start] != part_of[start + length - 1]:
            expected += length
        start += length
    assert Documents.of_lengths(lengths).carried(parts) == expected


@pytest.mark.parametrize("starts", [(1, 4), (0, 4, 4), (0, 10), (0, -1)])
def test_positions_that_are_no_starts_are_refused(starts):
    with pytest.raises(ValueError, match="ascending positions from 0 to below 10, not at"):
        Documents(starts, 10)


@given(packed())
def test_the_cost_is_that_of_every_token_in_its_own_document(drawn):
    rows, cuts = drawn
    cost = PackedCost(SMALL, [Documents.of_lengths(row) for row in rows])
    for part in sub_sequences(cuts):
        expected = operations(SMALL, rows, part.start, part.stop)
        assert cost.of(part.start, part.stop) == pytest.approx(expected, rel=1e-9)


@given(packed(), st.floats(0, 1))
def test_tokens_within_is_the_inverse_of_the_cost(drawn, share):
    rows, _ = drawn
    total = sum(rows[0])
    cost = PackedCost(SMALL, [Documents.of_lengths(row) for row in rows])
    tokens = share * total
    assert cost.tokens_within(cost.of_first(tokens)) == pytest.approx(tokens, abs=1e-7)


@given(st.integers(16, 100_000), st.integers(1, 16))
def test_one_document_is_cut_as_a_sequence_without_packing(length, num_splits):
    blind = partition(length, num_splits, method="uniform_comp", cost=LLAMA_7B)
    one = PackedCost(LLAMA_7B, [Documents.of_lengths([length])])
    assert partition(length, num_splits, method="uniform_comp", cost=one) == blind


@given(packed(), st.integers(1, 4))
def test_cuts_lie_at_the_nearest_unit_to_equal_shares(drawn, multiple):
    rows, cuts = drawn
    num_splits = len(cuts)
    rows = [[length * multiple * num_splits for length in row] for row in rows]
    total = sum(rows[0])
    cost = PackedCost(LLAMA_7B, [Documents.of_lengths(row) for row in rows])
    lengths = partition(total, num_splits, method="uniform_comp", cost=cost, multiple=multiple)
    assert sum(lengths) == total
    assert all(length > 0 and length % multiple == 0 for length in lengths)
    # Each end is off by half a unit at most, and no token costs more than the deepest one.
    dearest = LLAMA_7B.linear + LLAMA_7B.attention * total
    slack = multiple * dearest * len(rows)
    share = cost.of_first(total) / num_splits
    for part in sub_sequences(lengths):
        assert cost.of(part.start, part.stop) <= share + slack


def test_real_lengths_balance_what_a_cut_without_them_does_not():
    documents = Documents.of_lengths([100, 6000, 92, 1000, 1000])
    cost = PackedCost(LLAMA_7B, [documents])
    blind = partition(8192, 4, method="uniform_comp", cost=LLAMA_7B)
    aware = partition(8192, 4, method="uniform_comp", cost=cost)
    assert imbalance(aware, cost) < 1e-3 < imbalance(blind, cost)


def test_rows_of_different_length_are_refused():
    with pytest.raises(ValueError, match=r"equally long, not \[10, 11\]"):
        PackedCost(SMALL, [Documents.of_lengths([10]), Documents.of_lengths([11])])


def test_cutting_is_fast():
    documents = Documents.of_lengths([128] * 1024)

    def seconds() -> float:
        begin = time.perf_counter()
        partition(131_072, 8, method="uniform_comp", cost=PackedCost(LLAMA_7B, [documents]))
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.1
