"""Hugging Face's safetensors folders, read and written one tensor at a time."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seq1f1b_tools.checkpoint.mapping import Piece
from seq1f1b_tools.checkpoint.problem import ConversionError

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_INDEX = "model.safetensors.index.json"
_MOST_NAMED = 5
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


class Source:
    """The tensors of a folder, found by their names; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Look at every shard's header; raises ConversionError for one that cannot be read."""
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise ConversionError(f"{folder} has no *.safetensors")
        for shard in shards:
            try:
                with safe_open(shard, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        self._files[name] = shard
                        self._shapes[name] = tuple(tensors.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{shard} is damaged or cut off: {error}") from None
        index = folder / _INDEX
        if index.exists():
            named = json.loads(index.read_text())["weight_map"]
            for name, file in named.items():
                if not (folder / file).exists():
                    raise ConversionError(f"{folder / file} is missing; {_INDEX} names it")
                if name not in self._files:
                    raise ConversionError(f"{folder / file}: no tensor {name}; {_INDEX} names it")

    def check(self, pieces: Iterable[Piece], *, is_tied: bool) -> None:
        """Raise ConversionError unless the tensors are those of ``pieces``, and no others."""
        left = {name for name in self._files if not name.endswith(_NOT_WEIGHTS)}
        for piece in pieces:
            for name, shape in zip(piece.names, piece.shapes, strict=True):
                if name not in self._files:
                    raise ConversionError(f"{self._folder} has no tensor {name}")
                if self._shapes[name] != shape:
                    raise ConversionError(
                        f"{self._files[name]}: {name} has shape {list(self._shapes[name])}, "
                        f"config.json means {list(shape)}"
                    )
                left.discard(name)
        if is_tied:
            left.discard("lm_head.weight")
        if left:
            some = ", ".join(sorted(left)[:_MOST_NAMED])
            raise ConversionError(
                f"{self._folder}: {len(left)} tensors have no place in Megatron's model: {some}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The type that weights have."""
        return self.read(next(iter(self._files))).dtype

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        with safe_open(self._files[name], "pt") as tensors:
            return tensors.get_tensor(name)


def write(
    folder: Path,
    like: Path,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    shard_bytes: int,
) -> None:
    """Write ``tensors`` as shards of at most ``shard_bytes``, with the other files of ``like``.

    No more than one shard is in memory. A tensor larger than ``shard_bytes`` is a shard by itself.
    """
    folder.mkdir(parents=True)
    for pattern in _COPIED:
        for file in like.glob(pattern):
            if file.name != _INDEX:
                shutil.copy(file, folder / file.name)
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / _part(len(shards)), metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
    flush()
    _name_shards(folder, shards)


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give shards the names that Hugging Face looks for, and several of them an index."""
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(size for names in shards for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))
