"""Megatron's torch_dist checkpoints, read piece by piece, with everything checked on the way.

Neither a pickle nor a path in a checkpoint is trusted: no class is loaded but those that describe
tensors, no file is read outside of the folder, and the check sum of each tensor is compared.
"""

import math
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from seq1f1b_tools.checkpoint import zip_check
from seq1f1b_tools.checkpoint.mapping import Piece
from seq1f1b_tools.checkpoint.problem import ConversionError, is_file_name, one_line, without_mtp
from seq1f1b_tools.checkpoint.torch_dist import TRACKER

_NOT_OF_THE_MODEL = ("optimizer.", "chained_")
_MOST_CELLS = 10**8
_MOST_NAMED = 5

Range = tuple[tuple[int, int], ...]
"""Start and end on each axis."""


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor, and the bytes of a file that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass
class _Stored:
    """A tensor of the checkpoint."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: list[_Chunk] = field(default_factory=list)
    _by_place: dict[int, dict[tuple[int, ...], list[_Chunk]]] = field(default_factory=dict)

    def overlapping(self, piece: Piece) -> Iterator[_Chunk]:
        """Yield the chunks that hold a part of ``piece``."""
        axes = piece.num_axes
        if axes not in self._by_place:
            index: dict[tuple[int, ...], list[_Chunk]] = defaultdict(list)
            for chunk in self.chunks:
                counted = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
                for place in product(*(range(start, start + size) for start, size in counted)):
                    index[place].append(chunk)
            self._by_place[axes] = index
        for chunk in self._by_place[axes].get(piece.offsets[:axes], ()):
            starts = zip(piece.offsets, piece.sizes, chunk.offsets, chunk.sizes, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in starts):
                yield chunk


class Checkpoint:
    """A torch_dist checkpoint to read pieces of: the latest iteration in ``folder``."""

    def __init__(self, folder: Path) -> None:
        """Raises ConversionError when there is none."""
        self.path = _latest(folder)
        self._tensors = _read_metadata(self.path)
        self._left = {key for key in self._tensors if not key.startswith(_NOT_OF_THE_MODEL)}
        self._load = lru_cache(maxsize=1)(self._load_chunk)

    def __contains__(self, key: str) -> bool:
        """Whether there is a tensor of this name."""
        return key in self._tensors

    def ignore(self, prefixes: tuple[str, ...], *, is_meant: bool) -> None:
        """Leave the layers for multi-token prediction out, or refuse them."""
        self._left = without_mtp(self._left, prefixes, is_meant=is_meant)

    def check(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return ``pieces``; raises ConversionError unless the model's tensors are theirs.

        The vocabulary may have been padded.
        """
        found, wanted = [], set()
        for piece in pieces:
            found.append(piece)
            if piece.key in wanted:
                continue
            wanted.add(piece.key)
            if piece.key not in self._tensors:
                raise ConversionError(f"{self.path} has no tensor {piece.key}")
            size = self._tensors[piece.key].size
            shown = (min(size[0], piece.whole[0]), *size[1:]) if piece.rows and size else size
            if shown != piece.whole:
                raise ConversionError(
                    f"{self.path}: {piece.key} has shape {list(size)}, config.json "
                    f"means {list(piece.whole)}"
                )
        if left := self._left - wanted:
            some = ", ".join(sorted(left)[:_MOST_NAMED])
            raise ConversionError(
                f"{self.path}: {len(left)} tensors have no place in the model of config.json: "
                f"{some}"
            )
        for key in sorted(wanted):
            _check_tiles(self._tensors[key], f"{self.path}: {key}")
        return found

    def padding(self, pieces: Iterable[Piece]) -> int:
        """Return the number of tokens by which the vocabulary was padded."""
        return max(self._tensors[p.key].size[0] - p.whole[0] for p in pieces if p.rows)

    def dtypes(self, pieces: Iterable[Piece]) -> set[torch.dtype]:
        """Return the types that tensors of ``pieces`` have."""
        return {self._tensors[piece.key].dtype for piece in pieces}

    def num_bytes(self, pieces: Iterable[Piece]) -> int:
        """Return the size of ``pieces``."""
        return sum(
            math.prod(piece.sizes) * self._tensors[piece.key].dtype.itemsize for piece in pieces
        )

    def read(self, piece: Piece) -> Tensor:
        """Return one piece, ``own_sizes`` large. Raises ConversionError when it cannot be read."""
        stored = self._tensors[piece.key]
        tensor = torch.empty(piece.sizes, dtype=stored.dtype)
        for chunk in stored.overlapping(piece):
            loaded = self._load(chunk, stored.dtype, piece.key)
            here, there = _common(piece, chunk)
            tensor[here] = loaded[there]
        return tensor.reshape(piece.own_sizes)

    def _load_chunk(self, chunk: _Chunk, dtype: torch.dtype, key: str) -> Tensor:
        file = self.path / chunk.file
        try:
            with file.open("rb") as stream:
                part = zip_check.part_of(stream, chunk.start, chunk.length)
                zip_check.check(part, file)
                loaded = torch.load(part, map_location="cpu", weights_only=True)
        except (ConversionError, OSError) as error:
            raise ConversionError(f"cannot read {key}: {one_line(error)}") from None
        except Exception as error:  # a pickle can fail in any way
            raise ConversionError(f"cannot read {key}: {file}: {one_line(error)}") from None
        if not isinstance(loaded, Tensor) or loaded.dtype != dtype:
            raise ConversionError(f"cannot read {key}: {file} holds no tensor of {dtype} there")
        if tuple(loaded.shape) != chunk.sizes:
            raise ConversionError(
                f"cannot read {key}: {file} holds one of shape {list(loaded.shape)}, "
                f"not {list(chunk.sizes)}"
            )
        return loaded


def _common(piece: Piece, chunk: _Chunk) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where the part that both have lies in each of them."""
    here, there = [], []
    for a, b, c, d in zip(piece.offsets, piece.sizes, chunk.offsets, chunk.sizes, strict=True):
        start, end = max(a, c), min(a + b, c + d)
        here.append(slice(start - a, end - a))
        there.append(slice(start - c, end - c))
    return tuple(here), tuple(there)


def _latest(folder: Path) -> Path:
    """Return the folder of the iteration that the tracker names; without one, ``folder``."""
    tracker = folder / TRACKER
    try:
        latest = tracker.read_text(errors="replace").strip()
    except FileNotFoundError:
        return folder
    if latest == "release":
        return folder / latest
    if not (latest.isascii() and latest.isdecimal() and len(latest) < 20):
        raise ConversionError(
            f"{tracker} holds {latest!r:.80}, neither the number of an iteration nor release: "
            "write the one to convert into it"
        )
    return folder / f"iter_{int(latest):07d}"


# -------------------------------------------------------------------------------- .metadata


def _nothing(*_: Any, **__: Any) -> None:
    return None


_KNOWN: dict[tuple[str, str], Any] = {
    **{
        (known.__module__, known.__name__): known
        for known in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.BytesStorageMetadata,
            metadata.TensorStorageMetadata,
            metadata.TensorProperties,
            metadata.ChunkStorageMetadata,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    # values that are not used
    **dict.fromkeys(
        (
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
            ("pathlib._local", "PosixPath"),
        ),
        _nothing,
    ),
}


class _Unpickler(pickle.Unpickler):
    """Loads the classes that describe the tensors of a checkpoint, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise ConversionError(
            f"holds {module}.{name}, which no description of tensors needs: it is not loaded, as "
            "it could run any code"
        )


def _read_metadata(path: Path) -> dict[str, _Stored]:
    file = path / ".metadata"
    try:
        with file.open("rb") as stream:
            described = _Unpickler(stream).load()
        return dict(_described(described))
    except ConversionError as error:
        raise ConversionError(f"{file} {error}") from None
    except OSError as error:
        raise ConversionError(
            f"{path} is no checkpoint in Megatron's torch_dist format: {one_line(error)}"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise ConversionError(f"{file} is damaged: {one_line(error)}") from None


def _described(described: metadata.Metadata) -> Iterator[tuple[str, _Stored]]:
    """Yield the tensors; raises ConversionError for what cannot be true of any."""
    seen = set()
    for key, stored in described.state_dict_metadata.items():
        if not isinstance(stored, metadata.TensorStorageMetadata):
            continue
        dtype, size = stored.properties.dtype, _numbers(stored.size)
        if not isinstance(dtype, torch.dtype):
            raise ConversionError(f"is damaged: {key} has no type")
        tensor = _Stored(dtype, size)
        for chunk in stored.chunks:
            offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
            where = described.storage_data[metadata.MetadataIndex(key, torch.Size(offsets))]
            file, (start, length) = where.relative_path, _numbers((where.offset, where.length))
            if not isinstance(file, str) or not is_file_name(file):
                raise ConversionError(f"is damaged: {key} lies in {file!r:.80}, no file's name")
            if getattr(where, "transform_descriptors", None):
                raise ConversionError(f"is not readable here: {key} is stored compressed")
            if (file, start) in seen:
                raise ConversionError(f"is damaged: {key} lies where another tensor does")
            seen.add((file, start))
            tensor.chunks.append(_Chunk(offsets, sizes, file, start, length))
        yield key, tensor


def _numbers(values: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ConversionError(f"is damaged: {numbers!r:.80} are no sizes")
    return numbers


def _check_tiles(stored: _Stored, name: str) -> None:
    """Raise ConversionError unless the chunks cover the tensor, each element once."""
    axes = len(stored.size)
    if not all(len(c.offsets) == len(c.sizes) == axes for c in stored.chunks):
        raise ConversionError(f"{name} is damaged: its parts have other dimensions than it")
    edges = [
        sorted({0, size, *(c.offsets[a] for c in stored.chunks), *_ends(stored.chunks, a)})
        for a, size in enumerate(stored.size)
    ]
    shape = [len(of_axis) - 1 for of_axis in edges]
    if math.prod(shape) > _MOST_CELLS or any(
        of_axis[-1] != size for of_axis, size in zip(edges, stored.size, strict=True)
    ):
        raise ConversionError(f"{name} is damaged: its parts do not fit together")
    places = [{edge: place for place, edge in enumerate(of_axis)} for of_axis in edges]
    covered = np.zeros(shape, dtype=bool)
    for chunk in stored.chunks:
        cells = tuple(
            slice(of_axis[start], of_axis[start + size])
            for of_axis, start, size in zip(places, chunk.offsets, chunk.sizes, strict=True)
        )
        if covered[cells].any():
            raise ConversionError(f"{name} is damaged: parts of it lie on each other")
        covered[cells] = True
    if not covered.all():
        raise ConversionError(f"{name} is damaged: a part of it is missing")


def _ends(chunks: Sequence[_Chunk], axis: int) -> Iterator[int]:
    return (chunk.offsets[axis] + chunk.sizes[axis] for chunk in chunks)
