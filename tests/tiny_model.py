"""A small causal transformer in plain torch, cut into pipeline stages; knows no Megatron."""

import torch
from torch import Tensor, nn

from seq1f1b.runtime import DeferrableLinear, ExecutionContext
from seq1f1b.schedule import Action
from seq1f1b.sequence import SubSequence, TokenCost

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 16, 4, 2, 8, 23, 8
COST = TokenCost.of_transformer(
    num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=KV_HEADS
)


class Layer(nn.Module):
    def __init__(self, context: ExecutionContext) -> None:
        super().__init__()
        defer = context.weight_gradient
        self.context = context
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = DeferrableLinear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, defer)
        self.out = DeferrableLinear(HEADS * HEAD_DIM, HIDDEN, defer)
        self.mlp = nn.Sequential(
            nn.LayerNorm(HIDDEN),
            DeferrableLinear(HIDDEN, 32, defer),
            nn.GELU(),
            DeferrableLinear(32, HIDDEN, defer),
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, HEAD_DIM))
        query, key, value = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        attended = self.context.attend(self, query, key, value, HEAD_DIM**-0.5)
        x = x + self.out(attended.flatten(2))
        return x + self.mlp(x)


class ModelPart(nn.Module):
    """Layers ``first`` to ``stop`` of the model; every part is made from the same seed."""

    def __init__(
        self, part: int, num_parts: int, max_length: int, context: ExecutionContext
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.context = context
        layers = [Layer(context) for _ in range(LAYERS)]
        per_part = LAYERS // num_parts
        self.layers = nn.ModuleList(layers[part * per_part : (part + 1) * per_part])
        embedding, positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(max_length, HIDDEN)
        head = nn.Linear(HIDDEN, VOCAB)
        self.is_first, self.is_last = part == 0, part == num_parts - 1
        if self.is_first:
            self.embedding, self.positions = embedding, positions
        if self.is_last:
            self.head = head
        self.double()

    def forward(self, x: Tensor | None, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return hidden states, or on the last part the summed loss of ``labels`` ``[n, b]``."""
        if self.is_first:
            places = torch.arange(tokens.shape[0])[:, None] + self.context.offset
            x = self.embedding(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x)
        if self.is_last:
            logits = self.head(x)
            return nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
        return x


def micro_batches(count: int, length: int, batch: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Return ``count`` pairs of tokens and labels, ``[length, batch]`` each."""
    generator = torch.Generator().manual_seed(7)
    draws = torch.randint(0, VOCAB, (count, length + 1, batch), generator=generator)
    return [(draw[:-1], draw[1:]) for draw in draws]


class TinyComputation:
    """Runs the model parts of one stage on slices of the micro-batches."""

    def __init__(
        self,
        chunks: list[ModelPart],
        data: list[tuple[Tensor, Tensor]],
        parts: list[tuple[SubSequence, ...]],
        context: ExecutionContext,
    ) -> None:
        self.chunks, self.data, self.parts, self.context = chunks, data, parts, context
        self.losses: dict[Action, float] = {}

    def forward(self, action: Action, received: Tensor | None) -> Tensor:
        part = self.parts[action.micro_batch][action.sub_sequence]
        tokens, labels = (x[part.start : part.stop] for x in self.data[action.micro_batch])
        output = self.chunks[action.chunk](received, tokens, labels)
        if self.chunks[action.chunk].is_last:
            output = output / (self.data[action.micro_batch][1].numel() * len(self.data))
            self.losses[action] = output.item()
        return output

    def backward(
        self, action: Action, received: Tensor | None, output: Tensor, gradient: Tensor | None
    ) -> Tensor | None:
        torch.autograd.backward(output, gradient)
        return None if received is None else received.grad

    def weight_gradients(self, action: Action) -> None:
        self.context.weight_gradients.compute(action)

    def output_sent(self, output: Tensor) -> None:
        pass


def reference(num_parts: int, data: list[tuple[Tensor, Tensor]]) -> tuple[float, list[ModelPart]]:
    """Plain autograd on whole micro-batches in one process: the loss and parts with gradients."""
    length = data[0][0].shape[0]
    context = ExecutionContext("reference")
    parts = [ModelPart(part, num_parts, length, context) for part in range(num_parts)]
    total = 0.0
    for tokens, labels in data:
        x = None
        for part in parts:
            x = part(x, tokens, labels)
        loss = x / (labels.numel() * len(data))
        loss.backward()
        total += loss.item()
    return total, parts
