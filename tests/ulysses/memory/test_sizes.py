"""How much memory a step takes: per rank, in tiles, in sub-sequences; never pairs of tokens."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from seq1f1b.ulysses import (
    backward_in_subsequences,
    dispatch_modules,
    init_sequence_parallel,
    pad_for_sequence_parallel,
    reduce_sequence_parallel_loss,
    split_for_sequence_parallel,
)

VOCABULARY = 1031


class LargestTensors(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.see(x)
        return result

    def see(self, x: Tensor) -> None:
        self.largest = max(self.largest, x.numel())


class TensorsOfWidth(LargestTensors):
    """Looks only at tensors with a last dimension of ``width``, and at how many are alive."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.alive = self.peak = 0
        self._seen: dict[int, int] = {}

    def see(self, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.width or not x.is_floating_point():
            return
        super().see(x)
        storage = x.untyped_storage()
        key = storage.data_ptr()
        if key not in self._seen:
            self._seen[key] = x.numel()
            self.alive += x.numel()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive -= self._seen.pop(key)


def build(model_type: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2**20,
        **settings,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).train()


def step(model: Any, length: int, layout: str = "plain") -> None:
    ids = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    positions, mask = torch.arange(length)[None], None
    if layout == "packed":
        positions = positions % (length // 3)
    if layout == "padded":
        mask = torch.ones_like(ids)
        mask[:, -length // 5 :] = 0
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    padded = pad_for_sequence_parallel(ids, labels, positions, mask)
    share = split_for_sequence_parallel(*padded[:3])
    output = model(
        input_ids=share[0], labels=share[1], position_ids=share[2], attention_mask=padded[3]
    )
    reduce_sequence_parallel_loss(output.loss, (share[1] != -100).sum()).backward()


def largest_in_a_step(model_type: str, size: int, layout: str, settings: dict[str, Any]) -> int:
    init_sequence_parallel(size)
    model = dispatch_modules(build(model_type, **settings), loss_tile=64)
    with LargestTensors() as seen:
        step(model, 1024, layout)
    return seen.largest


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("llama", {}),
        ("llama", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}),
        ("mistral", {"sliding_window": 100}),
        ("gemma2", {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt_oss", {"sliding_window": 100, "num_local_experts": 4, "intermediate_size": 32}),
    ],
)
def test_nothing_of_pairs_of_tokens_is_made(workers, model_type, size, layout, settings):
    pairs = 1024 * 1024
    # what is as long as the rows, of the widest layer, is a quarter of that
    for largest in workers(size).run(largest_in_a_step, model_type, size, layout, settings):
        assert largest <= pairs // 4


def logits_alive(tile: int | None, length: int) -> tuple[int, int]:
    """Return the elements of the largest tensor as wide as the vocabulary, and of all at a time."""
    init_sequence_parallel(1)
    model = dispatch_modules(build("llama"), loss_tile=tile)
    with TensorsOfWidth(VOCABULARY) as seen:
        step(model, length)
    return seen.largest, seen.peak


def test_a_tile_of_logits_is_alive_at_a_time():
    tile = 128
    largest, peak = logits_alive(tile, 512)
    assert largest == tile * VOCABULARY
    # logits, their logarithm of softmax, its gradient, theirs, and the head's gradient
    assert peak <= 5 * tile * VOCABULARY
    assert logits_alive(tile, 1024) == (largest, peak)
    assert logits_alive(None, 512)[0] == 512 * VOCABULARY


class SavedBytes:
    """Counts bytes that autograd keeps, parameters apart, and their peak."""

    def __init__(self, model: Any) -> None:
        self._constant = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._holders: dict[int, int] = {}
        self.alive = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        key = tensor.untyped_storage().data_ptr()
        if key in self._constant:
            return tensor
        if key not in self._holders:
            self._holders[key] = 0
            self.alive += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.alive)
        self._holders[key] += 1
        return _Held(self, tensor, key)

    def drop(self, key: int, nbytes: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.alive -= nbytes


class _Held:
    def __init__(self, meter: SavedBytes, tensor: Tensor, key: int) -> None:
        self.meter, self.tensor, self.key = meter, tensor, key

    def __del__(self) -> None:
        self.meter.drop(self.key, self.tensor.untyped_storage().nbytes())


def saved_in(model: Any, run: Callable[[], object]) -> int:
    meter = SavedBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(
        meter.pack, lambda x: x.tensor if isinstance(x, _Held) else x
    ):
        run()
    return meter.peak


def saved_in_a_step(size: int, length: int, mlp_tile: int | None = None) -> int:
    init_sequence_parallel(size)
    model = dispatch_modules(build("llama"), loss_tile=64, mlp_tile=mlp_tile)
    step(model, 64)
    return saved_in(model, lambda: step(model, length))


@pytest.mark.distributed
@pytest.mark.parametrize("mlp_tile", [None, 1024])  # two tiles, one, and a part of one
def test_a_rank_keeps_its_share_of_activations(workers, mlp_tile):
    whole = workers(1).run(saved_in_a_step, 1, 2048, mlp_tile)[0]
    for size in (2, 4):
        for share in workers(size).run(saved_in_a_step, size, 2048, mlp_tile):
            assert share * size / whole <= 1.15


def carried_bytes(size: int, length: int) -> int:
    """Keys, values and their gradients in float32, of two layers with 2 heads of 16."""
    return 2 * 2 * 2 * (length * 2 * 16 * 4) // size


def saved_in_parts(size: int, length: int, count: int) -> int:
    init_sequence_parallel(size)
    model = dispatch_modules(build("llama"), loss_tile=64)
    ids = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    peak = saved_in(model, lambda: backward_in_subsequences(model, ids, ids, subsequences=count))
    return peak + carried_bytes(size, length)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_sub_sequences_keep_a_third_of_activations(workers, size):
    plain = max(workers(size).run(saved_in_a_step, size, 2048))
    parts = max(workers(size).run(saved_in_parts, size, 2048, 16))
    assert parts <= plain / 3
    assert dist.is_available()
