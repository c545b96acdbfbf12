"""Seq1F1B on plain torch: a small causal transformer over pipeline stages, without Megatron.

    torchrun --nproc-per-node 2 examples/without_megatron.py --splits 4

Every rank is a stage. The five things that a training loop of your own needs are marked 1 to 5.
"""

import argparse
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seq1f1b.runtime import (
    ALL_CHANNELS,
    ActionClock,
    DeferrableLinear,
    ExecutionContext,
    PointToPoint,
    execute,
)
from seq1f1b.schedule import Action, Plan, one_f_one_b
from seq1f1b.sequence import TokenCost, partition, sub_sequences

HIDDEN, HEADS, VOCAB, LAYERS = 64, 4, 97, 4


class Layer(nn.Module):
    """A transformer layer whose attention sees earlier sub-sequences."""

    def __init__(self, context: ExecutionContext) -> None:
        super().__init__()
        linear = context.weight_gradient
        self.context = context
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.qkv = DeferrableLinear(HIDDEN, 3 * HIDDEN, linear)
        self.out = DeferrableLinear(HIDDEN, HIDDEN, linear)
        self.up = DeferrableLinear(HIDDEN, 4 * HIDDEN, linear)
        self.down = DeferrableLinear(4 * HIDDEN, HIDDEN, linear)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[n, b, hidden]``: the tokens of the running sub-sequence."""
        query, key, value = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        # 1. Attention goes through the context, which carries keys and values.
        attended = self.context.attend(self, query, key, value, query.shape[-1] ** -0.5)
        x = x + self.out(attended.flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Stage(nn.Module):
    """This rank's layers, with the embedding on the first stage and the loss on the last."""

    def __init__(self, stage: int, num_stages: int, length: int, context: ExecutionContext) -> None:
        super().__init__()
        self.context = context
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.layers = nn.ModuleList(Layer(context) for _ in range(LAYERS // num_stages))
        self.tokens = nn.Embedding(VOCAB, HIDDEN) if self.is_first else None
        self.positions = nn.Embedding(length, HIDDEN) if self.is_first else None
        self.head = nn.Linear(HIDDEN, VOCAB) if self.is_last else None

    def forward(self, x: Tensor | None, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return ``[n, b, hidden]``, or on the last stage the sum of the tokens' losses."""
        if self.tokens is not None and self.positions is not None:
            # 2. Positions count from the start of the micro-batch.
            places = torch.arange(len(tokens))[:, None] + self.context.offset
            x = self.tokens(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x)
        if self.head is None:
            assert x is not None
            return x
        logits = self.head(x).flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")


@dataclass
class Training:
    """3. What a stage computes in an action; see ``seq1f1b.runtime.Computation``."""

    stage: Stage
    context: ExecutionContext
    plan: Plan
    batches: list[Tensor]
    loss: float = 0.0

    def forward(self, action: Action, received: Tensor | None) -> Tensor:
        part = self.plan.cuts[action.micro_batch][action.sub_sequence]
        text = self.batches[action.micro_batch]
        tokens, labels = text[part.start : part.stop], text[part.start + 1 : part.stop + 1]
        output = self.stage(received, tokens, labels)
        if self.stage.is_last:
            # 4. Divide by the tokens of all micro-batches, not by those of a sub-sequence.
            output = output / sum(batch[1:].numel() for batch in self.batches)
            self.loss += output.item()
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


def main() -> None:
    """Train on random text that repeats, and print the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = {channel: dist.new_group() for channel in ALL_CHANNELS}

    cost = TokenCost.of_transformer(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, vocab_size=VOCAB
    )
    lengths = partition(options.length, options.splits, method="uniform_comp", cost=cost)
    # 5. A plan says who computes what, when, and where micro-batches are cut.
    plan = Plan.of(
        one_f_one_b(size, options.micro_batches, options.splits),
        [sub_sequences(lengths)] * options.micro_batches,
    )
    torch.manual_seed(rank)
    context = ExecutionContext()
    stage = Stage(rank, size, options.length, context)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    text = torch.randint(0, VOCAB, (17, 2), generator=torch.Generator().manual_seed(0))
    batch = text.repeat(-(-options.length // 17) + 1, 1)[: options.length + 1]
    for step in range(options.steps):
        training = Training(stage, context, plan, [batch] * options.micro_batches)
        transport = PointToPoint(
            plan.schedule,
            rank,
            ranks=range(size),
            groups=groups,
            shape=lambda action: (lengths[action.sub_sequence], 2, HIDDEN),
            dtype=torch.float32,
            device="cpu",
        )
        actions = plan.schedule.stages[rank]
        execute(actions, training, transport, context, plan.cuts, ActionClock(), stage=rank)
        optimizer.step()
        optimizer.zero_grad()
        if stage.is_last:
            print(f"step {step}: loss {training.loss:.4f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
