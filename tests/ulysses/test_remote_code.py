"""Models from outside of transformers: exact through torch's own attention, or refused by name."""

import pytest
import torch
from torch import nn

from seq1f1b.ulysses import (
    CallError,
    UnsupportedModelError,
    dispatch_modules,
    init_sequence_parallel,
    split_for_sequence_parallel,
)
from seq1f1b.ulysses.check.batches import make_batch
from seq1f1b.ulysses.check.compare import Comparison, compare
from seq1f1b.ulysses.randomise import randomise
from tests.ulysses.remote_code import VOCABULARY, RemoteConfig, RemoteForCausalLM


def build(mixer: str, **settings: object) -> RemoteForCausalLM:
    torch.manual_seed(0)
    return randomise(RemoteForCausalLM(RemoteConfig(mixer=mixer, **settings)).eval())


def run_remote(mixer: str, size: int) -> list[Comparison]:
    init_sequence_parallel(size)
    layouts = ["plain", "packed", "padded"]
    if mixer != "glm":  # which itself does not look at the mask
        layouts.append("padded-left")
    batches = [(x, make_batch(x, VOCABULARY, num_rows=2)) for x in layouts]
    return compare(lambda: build(mixer), batches, size)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mixer", ["sdpa", "glm"])
def test_code_that_calls_torchs_attention_is_exact(workers, mixer, size):
    for result in workers(size).run(run_remote, mixer, size)[0]:
        assert result.is_exact, (result.layout, result.loss_error, result.worst)


@pytest.mark.parametrize(
    "mixer, message",
    [
        ("softmax", "OwnSoftmaxAttention mixes tokens"),
        ("shift", "TokenShift mixes tokens"),
        ("alibi", "AlibiAttention adds a bias to attention scores"),
        ("window", r"WindowedAttention brings a mask .* not plainly causal"),
        ("positions", "ShardPositions takes positions from the shard"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(mixer, message):
    init_sequence_parallel(1)
    model = build(mixer)
    before = {name: id(x) for name, x in vars(model).items()}
    ids = torch.arange(8)[None]
    wanted = model(ids).logits
    with pytest.raises(UnsupportedModelError, match=message):
        dispatch_modules(model)
    assert {name: id(x) for name, x in vars(model).items()} == before
    assert torch.equal(model(ids).logits, wanted)


def test_a_loss_of_another_formula_is_refused():
    init_sequence_parallel(1)
    model = build("sdpa", z_loss_weight=0.1)
    dispatch_modules(model)
    ids = torch.arange(8)[None]
    shares = split_for_sequence_parallel(ids, ids, None)
    assert model(input_ids=shares[0]).logits.shape == (1, 8, VOCABULARY)
    with pytest.raises(CallError, match="computes a loss of its own"):
        model(input_ids=shares[0], labels=shares[1])


class Swapped(nn.Module):
    """An attention that a user has put in place of a model's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        return self.proj(hidden_states.cumsum(dim=1)), None


def test_a_module_that_the_user_swapped_in_is_seen():
    from transformers import LlamaConfig, LlamaForCausalLM

    init_sequence_parallel(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )
    model.model.layers[1].self_attn = Swapped(32)
    with pytest.raises(UnsupportedModelError, match="Swapped mixes tokens"):
        dispatch_modules(model)
