"""The model shapes that can be swept."""

from dataclasses import dataclass

from seq1f1b.sequence import TokenCost


@dataclass(frozen=True)
class ModelShape:
    """A GPT.

    num_query_groups: heads of keys and values, shared by groups of heads; None: one for each head.
    head_layers: how many layers the output layer counts as when they are dealt to the stages.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    head_layers: int = 0

    def layers_of_parts(self, num_parts: int) -> list[int] | None:
        """Deal layers to model chunks, fewer to the last, which has the output layer.

        Returns None where the chunks would not be equal.
        """
        share, rest = divmod(self.num_layers + self.head_layers, num_parts)
        if rest or share < self.head_layers:
            return None
        return [share] * (num_parts - 1) + [share - self.head_layers]

    @property
    def token_cost(self) -> TokenCost:
        """What a token costs, depending on its position."""
        return TokenCost.of_transformer(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
        )


# tiny suits two cores without a GPU: wide enough that computing outweighs calling, GQA, and a
# vocabulary (see VOCAB_SIZE) that makes the output layer as long as a layer of 4096 tokens.
# tiny-deep has layers enough for two model chunks a stage. The others are the shapes of the
# authors' scripts.
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 3, 256, 4, 2, head_layers=1),
        ModelShape("tiny-deep", 4, 128, 2),
        ModelShape("1.3b", 24, 2048, 16),
        ModelShape("2.7b", 32, 2560, 32),
        ModelShape("7b", 32, 4096, 32),
        ModelShape("13b", 40, 5120, 40),
        ModelShape("30b", 64, 6144, 64),
    )
}
