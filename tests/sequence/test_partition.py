"""Cutting a sequence: sums, multiples, balance, speed and every error."""

import time
from itertools import accumulate, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from seq1f1b.sequence import (
    BALANCE_METHODS,
    LatentAttention,
    PartitionError,
    TokenCost,
    imbalance,
    partition,
    sub_sequences,
)

COSTS = st.builds(
    TokenCost.of_transformer,
    num_layers=st.integers(1, 64),
    hidden_size=st.sampled_from([64, 512, 4096, 16384]),
    num_attention_heads=st.sampled_from([1, 4, 16]),
    vocab_size=st.sampled_from([0, 50257]),
)
LLAMA_7B = TokenCost.of_transformer(num_layers=32, hidden_size=4096, num_attention_heads=32)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw a length, a number of splits and a multiple that fit each other."""
    num_splits = draw(st.integers(1, 64))
    multiple = draw(st.integers(1, 16))
    units = draw(st.integers(num_splits, 20_000))
    return units * multiple, num_splits, multiple


@given(cuts(), st.sampled_from(BALANCE_METHODS), COSTS)
def test_lengths_are_positive_multiples_that_sum_to_the_sequence(cut, method, cost):
    length, num_splits, multiple = cut
    lengths = partition(length, num_splits, method=method, cost=cost, multiple=multiple)
    assert len(lengths) == num_splits
    assert sum(lengths) == length
    assert all(part > 0 and part % multiple == 0 for part in lengths)


@given(cuts())
def test_average_differs_by_at_most_one_multiple_longer_first(cut):
    length, num_splits, multiple = cut
    lengths = partition(length, num_splits, multiple=multiple)
    assert max(lengths) - min(lengths) in (0, multiple)
    assert list(lengths) == sorted(lengths, reverse=True)


@given(cuts(), COSTS)
def test_uniform_comp_cuts_at_the_unit_nearest_to_the_ideal(cut, cost):
    length, num_splits, multiple = cut
    total = cost.of(0, length)
    ideal = [cost.tokens_within(total * i / num_splits) for i in range(num_splits + 1)]
    # closer cuts than that may have to move for every sub-sequence to keep a unit of its own
    assume(all(after - before >= 2 * multiple for before, after in pairwise(ideal)))
    lengths = partition(length, num_splits, method="uniform_comp", cost=cost, multiple=multiple)
    for place, wanted in zip(accumulate(lengths, initial=0), ideal, strict=True):
        assert abs(place - wanted) <= multiple / 2 + 1e-9 * length


@given(cuts(), COSTS)
def test_uniform_comp_never_makes_later_sub_sequences_much_longer(cut, cost):
    length, num_splits, multiple = cut
    lengths = partition(length, num_splits, method="uniform_comp", cost=cost, multiple=multiple)
    assert all(after <= before + multiple for before, after in pairwise(lengths))


@given(COSTS, st.floats(1, 1e7))
def test_tokens_within_is_the_inverse_of_the_cost(cost, tokens):
    assert cost.tokens_within(cost.of_first(tokens)) == pytest.approx(tokens, rel=1e-9)


def test_tokens_within_without_attention_is_linear():
    assert TokenCost(linear=4.0, attention=0.0).tokens_within(20.0) == 5.0


def test_uniform_comp_balances_what_average_does_not():
    even = partition(65536, 4, cost=LLAMA_7B)
    balanced = partition(65536, 4, method="uniform_comp", cost=LLAMA_7B)
    assert imbalance(even, LLAMA_7B) > 0.2
    assert imbalance(balanced, LLAMA_7B) < 1e-4


def test_imbalance_is_the_excess_of_the_dearest_over_the_mean():
    assert imbalance((2, 1), TokenCost(linear=1.0, attention=0.0)) == pytest.approx(2 / 1.5 - 1)
    assert imbalance((7,), LLAMA_7B) == 0.0


def test_costs_of_sub_sequences_add_up_to_the_whole():
    parts = sub_sequences(partition(1000, 7))
    costs = [LLAMA_7B.of(part.start, part.stop) for part in parts]
    assert sum(costs) == pytest.approx(LLAMA_7B.of(0, 1000), rel=1e-12)
    # token by token: a query at position t attends to t + 1 keys
    tokens = sum(LLAMA_7B.linear + LLAMA_7B.attention * (t + 1) for t in range(1000))
    assert LLAMA_7B.of(0, 1000) == pytest.approx(tokens, rel=1e-12)


def test_token_cost_of_a_gpt_counts_its_matrix_products():
    cost = TokenCost.of_transformer(
        num_layers=2, hidden_size=8, num_attention_heads=4, vocab_size=100
    )
    # 4 h^2 of attention weights and 8 h^2 of MLP, 2 operations each, 2 layers, and the output
    assert cost == TokenCost(linear=2.0 * (2 * 12 * 64 + 800), attention=4.0 * 2 * 8)


def test_token_cost_knows_grouped_queries_gates_and_wide_mlps():
    cost = TokenCost.of_transformer(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=4,
        kv_channels=3,
        num_query_groups=2,
        ffn_hidden_size=10,
        gated_linear_unit=True,
    )
    assert cost.linear == 2.0 * (8 * (2 * 12 + 2 * 6) + 8 * 10 * 3)
    assert cost.attention == 4.0 * 12


@pytest.mark.parametrize("query_rank, query", [(5, 8 * 5 + 5 * 4 * 9), (None, 8 * 4 * 9)])
def test_token_cost_knows_latent_attention(query_rank, query):
    latent = LatentAttention(query_rank=query_rank, kv_rank=3, head=7, rotary=2, value=6)
    cost = TokenCost.of_transformer(
        num_layers=1, hidden_size=8, num_attention_heads=4, ffn_hidden_size=10, latent=latent
    )
    keys_and_values = 8 * (3 + 2) + 3 * 4 * (7 + 6)
    assert cost.linear == 2.0 * (query + keys_and_values + 4 * 6 * 8 + 8 * 10 * 2)
    assert cost.attention == 2.0 * 4 * (9 + 6)


def test_sub_sequences_lie_one_behind_the_other():
    parts = sub_sequences((5, 3, 4))
    assert [(part.index, part.start, part.stop, part.length) for part in parts] == [
        (0, 0, 5, 5),
        (1, 5, 8, 3),
        (2, 8, 12, 4),
    ]
    assert [part.is_last for part in parts] == [False, False, True]
    assert {part.total for part in parts} == {12}


def test_a_million_tokens_are_cut_in_well_under_a_millisecond():
    def seconds() -> float:
        start = time.perf_counter()
        partition(2**20, 64, method="uniform_comp", cost=LLAMA_7B, multiple=16)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 0.5e-3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": 8, "num_splits": 0}, "number of splits is 0; it must be at least 1"),
        ({"length": 8, "num_splits": 2, "multiple": 0}, "lengths cannot be multiples of 0"),
        (
            {"length": 10, "num_splits": 2, "multiple": 4},
            "sequence length 10 is not a multiple of 4, which every sub-sequence must be",
        ),
        (
            {"length": 8, "num_splits": 3, "multiple": 4},
            "3 splits of at least 4 token(s) each need a sequence of 12 tokens; it has 8",
        ),
        (
            {"length": 8, "num_splits": 2, "method": "uniform_comp"},
            "uniform_comp needs the cost of a token",
        ),
        (
            {"length": 8, "num_splits": 2, "method": "evenly"},
            "unknown balance method 'evenly'; choose one of average, uniform_comp",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(arguments, message):
    with pytest.raises(PartitionError) as error:
        partition(**arguments)
    assert str(error.value) == message
