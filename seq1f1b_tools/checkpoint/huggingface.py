"""Hugging Face's folders of weights, read and written one tensor at a time."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seq1f1b_tools.checkpoint import zip_check
from seq1f1b_tools.checkpoint.config import read_json
from seq1f1b_tools.checkpoint.mapping import Piece
from seq1f1b_tools.checkpoint.problem import ConversionError, is_file_name, one_line, without_mtp

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_MOST_NAMED = 5
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class _Safetensors:
    """The tensors of one safetensors file, which is open only while one is read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._described: dict[str, tuple[tuple[int, ...], torch.dtype | str]] = {}
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    part = stored.get_slice(name)
                    dtype = _TYPES.get(part.get_dtype(), part.get_dtype())
                    self._described[name] = tuple(part.get_shape()), dtype
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ConversionError(f"{file} is damaged or cut off: {one_line(error)}") from None
        self.names = frozenset(self._described)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Return shape and type; the type's name where it is none of weights."""
        return self._described[name]

    def read(self, name: str) -> Tensor:
        with safe_open(self._file, "pt") as stored:
            return stored.get_tensor(name)


class _Pickled:
    """The tensors of one file of torch.save, loaded without running what a pickle may hold."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            zip_check.check(stream, file)
        try:
            stored = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a pickle can fail in any way
            raise ConversionError(f"{file} cannot be loaded safely: {one_line(error)}") from None
        if not isinstance(stored, dict) or not all(map(_is_named_tensor, stored.items())):
            raise ConversionError(f"{file} holds something else than tensors by name")
        self._stored: dict[str, Tensor] = stored
        self.names = frozenset(stored)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Return shape and type; the type's name where it is none of weights."""
        tensor = self._stored[name]
        is_weight = tensor.dtype in _TYPES.values() and tensor.layout is torch.strided
        return tuple(tensor.shape), tensor.dtype if is_weight else str(tensor.dtype)

    def read(self, name: str) -> Tensor:
        return self._stored[name].contiguous()


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


class Source:
    """The tensors of a folder, found by their names; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Look at every file's header; raises ConversionError for one that cannot be read."""
        self._folder = folder
        self._stored: dict[str, _Safetensors | _Pickled] = {}
        self._files: dict[str, Path] = {}
        self._described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, file, stored in _tensors(folder):
            shape, dtype = stored.describe(name)
            if isinstance(dtype, str):
                raise ConversionError(
                    f"{file}: {name} has type {dtype}, which is none of weights: models that are "
                    "quantized cannot be converted"
                )
            self._stored[name], self._files[name] = stored, file
            self._described[name] = shape, dtype
        self._left = {name for name in self._files if not name.endswith(_NOT_WEIGHTS)}

    def ignore(self, prefixes: tuple[str, ...], *, is_meant: bool) -> None:
        """Leave the layers for multi-token prediction out, or refuse them."""
        self._left = without_mtp(self._left, prefixes, is_meant=is_meant)

    def check(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return ``pieces``; raises ConversionError unless the tensors are just theirs."""
        left = set(self._left)
        found = []
        for piece in pieces:
            found.append(piece)
            for name, shape in zip(piece.names, piece.shapes, strict=True):
                if name not in self._files:
                    raise ConversionError(f"{self._folder} has no tensor {name}")
                if self._described[name][0] != shape:
                    raise ConversionError(
                        f"{self._files[name]}: {name} has shape {list(self._described[name][0])}, "
                        f"config.json means {list(shape)}"
                    )
                left.discard(name)
        if left:
            some = ", ".join(sorted(left)[:_MOST_NAMED])
            raise ConversionError(
                f"{self._folder}: {len(left)} tensors have no place in Megatron's model: {some}"
            )
        return found

    def dtype(self, piece: Piece) -> torch.dtype | None:
        """Return the narrowest type that holds all tensors of ``piece``; None if it has none."""
        dtype = None
        for name in piece.names:
            own = self._described[name][1]
            dtype = own if dtype is None else torch.promote_types(dtype, own)
        return dtype

    def unties(self) -> bool:
        """Whether there is an output layer other than the embedding; one that equals it is not."""
        if _HEAD not in self._files or _EMBEDDING not in self._files:
            return False
        if torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
            self._left.discard(_HEAD)
            return False
        return True

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._stored[name].read(name)


def _tensors(folder: Path) -> Iterator[tuple[str, Path, _Safetensors | _Pickled]]:
    """Yield name, file and stored tensors of everything that belongs to the model."""
    if (folder / _INDEX).exists():
        named = _weight_map(folder, _INDEX)
        if (folder / _SINGLE).exists() and _SINGLE not in named.values():
            raise ConversionError(
                f"{folder} holds {_SINGLE} beside {_INDEX}, which does not name it: remove the "
                "one that is out of date"
            )
        yield from _of_index(folder, _INDEX, named, _Safetensors)
    elif (folder / _SINGLE).exists():
        yield from _of_files([folder / _SINGLE], _Safetensors)
    elif shards := sorted(folder.glob("*.safetensors")):
        yield from _of_files(shards, _Safetensors)
    elif (folder / _PICKLED_INDEX).exists():
        named = _weight_map(folder, _PICKLED_INDEX)
        yield from _of_index(folder, _PICKLED_INDEX, named, _Pickled)
    elif (folder / _PICKLED).exists():
        yield from _of_files([folder / _PICKLED], _Pickled)
    else:
        raise ConversionError(f"{folder} has no *.safetensors and no {_PICKLED}")


def _weight_map(folder: Path, index: str) -> dict[str, str]:
    """Return the file of each tensor as an index names it."""
    file = folder / index
    named = read_json(file, missing=f"{file} cannot be opened").get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ConversionError(f"{file} has no weight_map")
    for name, part in named.items():
        if not isinstance(part, str) or not is_file_name(part):
            raise ConversionError(f"{file}: {name} lies in {part!r:.80}, which is no file's name")
    return named


def _of_index(
    folder: Path, index: str, named: Mapping[str, str], kind: Callable[[Path], Any]
) -> Iterator[tuple[str, Path, Any]]:
    """Yield only the tensors that an index names, each from the file that it names."""
    opened: dict[str, Any] = {}
    for name, part in named.items():
        file = folder / part
        if part not in opened:
            if not file.exists():
                raise ConversionError(f"{file} is missing; {index} names it")
            opened[part] = kind(file)
        if name not in opened[part].names:
            raise ConversionError(f"{file}: no tensor {name}; {index} names it")
        yield name, file, opened[part]


def _of_files(files: list[Path], kind: Callable[[Path], Any]) -> Iterator[tuple[str, Path, Any]]:
    seen: dict[str, Path] = {}
    for file in files:
        stored = kind(file)
        for name in sorted(stored.names):
            if name in seen:
                raise ConversionError(
                    f"{name} lies in {seen[name]} and in {file}: remove the one that is out of date"
                )
            seen[name] = file
            yield name, file, stored


def write(
    folder: Path,
    like: Path,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    shard_bytes: int,
    changed: dict[str, Any] | None = None,
) -> None:
    """Write ``tensors`` as shards of at most ``shard_bytes``, with the other files of ``like``.

    No more than one shard is in memory. A tensor larger than ``shard_bytes`` is a shard by itself.
    ``changed``: settings of config.json that are others than in ``like``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED:
        for file in like.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copy(file, folder / file.name)
    if changed:
        config = folder / "config.json"
        config.write_text(json.dumps(read_settings(like) | changed, indent=2) + "\n")
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


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what config.json holds."""
    return read_json(folder / "config.json", missing=f"{folder} has no config.json")


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give shards the names that Hugging Face looks for, and several of them an index."""
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(size for names in shards for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2))
