"""What the tokens of a causal transformer cost, as a function of their position.

A token costs the same in every projection, whatever its position, and one attention product per
token that it attends to. Sub-sequence ``[c, c + n)`` therefore costs

    linear * n + attention * (n * c + n * (n + 1) / 2)

floating-point operations in the forward pass (arXiv 2406.03488, section 3.3, which counts the
same two terms), and twice that in the backward pass.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from seq1f1b.sequence.documents import Documents


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    query_rank, kv_rank: width of the compressed query (None: not compressed), keys and values.
    head, rotary, value: width of one head's key without position, of its rotary part and its value.
    """

    query_rank: int | None
    kv_rank: int
    head: int
    rotary: int
    value: int

    def weights(self, hidden_size: int, num_heads: int) -> int:
        """Number of weights in the projections of one layer."""
        query_size = num_heads * (self.head + self.rotary)
        query = (
            hidden_size * query_size
            if self.query_rank is None
            else self.query_rank * (hidden_size + query_size)
        )
        down = hidden_size * (self.kv_rank + self.rotary)
        up = self.kv_rank * num_heads * (self.head + self.value)
        return query + down + up + num_heads * self.value * hidden_size

    def pair_width(self, num_heads: int) -> int:
        """Multiplications of one (query, key) pair in one layer."""
        return num_heads * (self.head + self.rotary + self.value)


@dataclass(frozen=True)
class TokenCost:
    """Forward floating-point operations of a whole model.

    linear: of one token in everything that does not look at other tokens.
    attention: of one (query, key) pair, summed over layers and heads.
    """

    linear: float
    attention: float

    @classmethod
    def of_transformer(
        cls,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        kv_channels: int | None = None,
        num_query_groups: int | None = None,
        ffn_hidden_size: int | None = None,
        gated_linear_unit: bool = False,
        vocab_size: int = 0,
        latent: LatentAttention | None = None,
    ) -> "TokenCost":
        """Count a GPT's matrix products: 2 operations per weight and token, 2 products per pair.

        ``ffn_hidden_size`` is the width one token passes through in all: for a mixture of experts,
        the sum over the experts it is routed to. ``vocab_size`` 0 leaves the output layer out.
        With ``latent``, the sizes of heads and groups are taken from it.
        """
        channels = kv_channels or hidden_size // num_attention_heads
        query_size = num_attention_heads * channels
        kv_size = (num_query_groups or num_attention_heads) * channels
        ffn = ffn_hidden_size or 4 * hidden_size
        attention_weights, pair_width = 2 * hidden_size * (query_size + kv_size), 2 * query_size
        if latent is not None:
            attention_weights = latent.weights(hidden_size, num_attention_heads)
            pair_width = latent.pair_width(num_attention_heads)
        mlp_weights = hidden_size * ffn * (3 if gated_linear_unit else 2)
        return cls(
            linear=2.0
            * (num_layers * (attention_weights + mlp_weights) + hidden_size * vocab_size),
            attention=2.0 * num_layers * pair_width,
        )

    def of(self, start: int, stop: int) -> float:
        """Forward operations of tokens ``[start, stop)`` of one sequence."""
        return self.of_first(stop) - self.of_first(start)

    def of_first(self, tokens: float) -> float:
        """Forward operations of the first ``tokens`` tokens."""
        return self.linear * tokens + self.attention * tokens * (tokens + 1) / 2

    def tokens_within(self, budget: float) -> float:
        """Return how many leading tokens cost ``budget``: the inverse of ``of_first``."""
        if self.attention == 0:
            return budget / self.linear
        slope = self.linear + self.attention / 2
        return 2 * budget / (slope + math.sqrt(slope * slope + 2 * self.attention * budget))


class PackedCost:
    """Forward operations of a micro-batch whose rows are packed with documents.

    A token attends to what lies before it in its own document, so its cost follows from its
    position there. Between two neighbouring starts of documents the cost of all rows together is a
    parabola in the position, which makes both directions closed formulas.

    linear: of one position in all rows, in everything that does not look at other tokens.
    """

    def __init__(self, cost: TokenCost, rows: Sequence[Documents]) -> None:
        """``rows`` are as long as each other; raises ValueError when they are not."""
        totals = {row.total for row in rows}
        if len(totals) != 1:
            raise ValueError(f"rows of one micro-batch are equally long, not {sorted(totals)}")
        self._curve = cost.attention * len(rows) / 2
        self.linear = cost.linear * len(rows)
        base = self.linear + self._curve
        self._breaks = sorted({start for row in rows for start in row.starts})
        self._slopes: list[float] = []
        self._costs: list[float] = []
        before = 0.0
        for start, stop in pairwise([*self._breaks, *totals]):
            depth = sum(start - row.starts[row.at(start)] for row in rows)
            self._slopes.append(base + cost.attention * depth)
            self._costs.append(before)
            before += (self._slopes[-1] + self._curve * (stop - start)) * (stop - start)

    def of(self, start: int, stop: int) -> float:
        """Forward operations of tokens ``[start, stop)`` of all rows."""
        return self.of_first(stop) - self.of_first(start)

    def of_first(self, tokens: float) -> float:
        """Forward operations of the first ``tokens`` tokens of all rows."""
        index = max(bisect_left(self._breaks, tokens) - 1, 0)
        beyond = tokens - self._breaks[index]
        return self._costs[index] + (self._slopes[index] + self._curve * beyond) * beyond

    def tokens_within(self, budget: float) -> float:
        """Return how many leading tokens cost ``budget``: the inverse of ``of_first``."""
        index = bisect_right(self._costs, budget) - 1
        rest, slope = budget - self._costs[index], self._slopes[index]
        root = math.sqrt(slope * slope + 4 * self._curve * rest)
        return self._breaks[index] + 2 * rest / (slope + root)
