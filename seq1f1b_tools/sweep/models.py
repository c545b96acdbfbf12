"""The model shapes that can be swept."""

from dataclasses import dataclass

from seq1f1b.sequence import TokenCost


@dataclass(frozen=True)
class ModelShape:
    """A GPT.

    num_query_groups: heads of keys and values, shared by groups of heads; None: one for each head.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None

    @property
    def token_cost(self) -> TokenCost:
        """What a token costs, depending on its position."""
        return TokenCost.of_transformer(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
        )


# tiny suits two cores without a GPU: a layer for each of two stages, wide enough that computing
# outweighs calling, four heads to one of keys and values as in Llama 3 8B, and a vocabulary (see
# VOCAB_SIZE) so small that the output layer hardly adds to the last stage.
# tiny-deep has layers enough for two model chunks a stage. The others are the shapes of the
# authors' scripts.
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 2, 256, 4, 1),
        ModelShape("tiny-deep", 4, 128, 2),
        ModelShape("1.3b", 24, 2048, 16),
        ModelShape("2.7b", 32, 2560, 32),
        ModelShape("7b", 32, 4096, 32),
        ModelShape("13b", 40, 5120, 40),
        ModelShape("30b", 64, 6144, 64),
    )
}
