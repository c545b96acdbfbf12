"""The model shapes that can be swept."""

from dataclasses import dataclass

from seq1f1b.sequence import TokenCost


@dataclass(frozen=True)
class ModelShape:
    """A GPT, and how its layers are dealt to pipeline stages.

    counts_output_layer: the output layer takes the place of one transformer layer on the last
        stage (Megatron's --account-for-loss-in-pipeline-split), so that stages stay in balance
        where it costs about as much as one.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    counts_output_layer: bool = False

    @property
    def num_dealt_layers(self) -> int:
        """Number of layers that are dealt to the stages evenly."""
        return self.num_layers + self.counts_output_layer

    @property
    def token_cost(self) -> TokenCost:
        """What a token costs, depending on its position."""
        return TokenCost.of_transformer(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
        )


# tiny suits two cores without a GPU: in two stages, with 4096 tokens, its output layer over the
# default vocabulary of 6144 costs as much as the layer that the first stage has more. The others
# are the shapes of the authors' scripts.
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("tiny", 3, 128, 2, counts_output_layer=True),
        ModelShape("1.3b", 24, 2048, 16),
        ModelShape("2.7b", 32, 2560, 32),
        ModelShape("7b", 32, 4096, 32),
        ModelShape("13b", 40, 5120, 40),
        ModelShape("30b", 64, 6144, 64),
    )
}
