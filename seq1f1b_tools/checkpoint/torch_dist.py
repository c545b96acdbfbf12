"""Megatron's torch_dist checkpoints, written and read piece by piece through torch's own format.

Such a checkpoint is one of ``torch.distributed.checkpoint``: tensors in pieces, and objects. Since
torch asks its planner for one piece at a time, no more than that has to be in memory.
"""

import io
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    load,
    save,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from seq1f1b_tools.checkpoint.mapping import Piece
from seq1f1b_tools.checkpoint.problem import ConversionError

# It says so of every piece; one process is what is wanted.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

_VERSION = 3.0
_TRACKER = "latest_checkpointed_iteration.txt"
_COMMON = "common_state/shard_0_1"
_HAS_EXTRA_STATE = (".linear_qkv.", ".linear_proj.", ".linear_fc1.", ".linear_fc2.")


def write(
    folder: Path,
    pieces: Sequence[Piece],
    make: Callable[[Piece], Tensor],
    dtype: torch.dtype,
    arguments: Mapping[str, Any],
) -> None:
    """Write a release checkpoint that ``--load folder`` reads.

    ``make`` returns the tensor of a piece, ``own_sizes`` large; it is called when the piece is
    written. ``arguments`` are Megatron's, for ``--use-checkpoint-args``.
    """
    release = folder / "release"
    release.mkdir(parents=True)
    common = {"args": Namespace(**arguments), "checkpoint_version": _VERSION, "iteration": 0}
    objects = {_COMMON: [common]} | {key: [None] for key in _extra_states(pieces)}
    try:
        # The state to save is empty; what is written is what the planner plans.
        save(
            {},
            storage_writer=FileSystemWriter(release),
            planner=_Writing(pieces, make, dtype, objects),
            no_dist=True,
        )
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ConversionError(f"{release} cannot be written: {reason}") from error
    (release / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    (folder / _TRACKER).write_text("release")


def _extra_states(pieces: Iterable[Piece]) -> Iterator[str]:
    """Name the empty states that Megatron's linear layers save beside their weights."""
    for piece in pieces:
        if piece.key.endswith(".weight") and any(part in piece.key for part in _HAS_EXTRA_STATE):
            axes = len(piece.whole) - len(piece.own_sizes)
            place = ".".join(map(str, piece.offsets[:axes]))
            count = ".".join(map(str, piece.whole[:axes]))
            yield f"{piece.key.removesuffix('weight')}_extra_state/shard_{place}_{count}"


class _Writing(DefaultSavePlanner):
    def __init__(
        self,
        pieces: Sequence[Piece],
        make: Callable[[Piece], Tensor],
        dtype: torch.dtype,
        objects: Mapping[str, Any],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._objects = objects
        self._make = make
        self._dtype = dtype
        self._pieces = {_index(piece): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        properties = TensorProperties(dtype=self._dtype)
        tensors = [
            WriteItem(
                index,
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(piece), properties, torch.Size(piece.whole)),
            )
            for index, piece in self._pieces.items()
        ]
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects]
        self.plan = SavePlan(tensors + objects)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[write_item.index.fqn], buffer)
            return buffer
        piece = self._pieces[write_item.index]
        return self._make(piece).to(self._dtype).reshape(piece.sizes).contiguous()


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, torch.Size(piece.offsets))


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))


class Checkpoint:
    """A torch_dist checkpoint to read pieces of: the latest iteration in ``folder``."""

    def __init__(self, folder: Path) -> None:
        """Raises ConversionError when there is none."""
        tracker = folder / _TRACKER
        self.path = folder
        if tracker.exists():
            latest = tracker.read_text().strip()
            self.path = folder / (latest if latest == "release" else f"iter_{int(latest):07d}")
        try:
            self._metadata: Metadata = FileSystemReader(self.path).read_metadata()
            self._reader = _Reader(self.path, self._metadata)
        except (OSError, EOFError) as error:
            raise ConversionError(
                f"{self.path} is no checkpoint in Megatron's torch_dist format: {error}"
            ) from None

    def check(self, pieces: Sequence[Piece]) -> int:
        """Raise ConversionError unless all ``pieces`` are there, of their shapes.

        A vocabulary may have been padded; returns by how many tokens.
        """
        padding = 0
        for piece in pieces:
            found = self._metadata.state_dict_metadata.get(piece.key)
            if not isinstance(found, TensorStorageMetadata):
                raise ConversionError(f"{self.path} has no tensor {piece.key}")
            size, wanted = tuple(found.size), piece.whole
            if "embedding" in piece.key or "output_layer" in piece.key:
                padding = max(padding, size[0] - wanted[0])
                size = (min(size[0], wanted[0]), *size[1:])
            if size != wanted:
                raise ConversionError(
                    f"{self.path}: {piece.key} has shape {list(found.size)}, config.json "
                    f"means {list(wanted)}"
                )
        return padding

    def read(self, piece: Piece) -> Tensor:
        """Return one piece, ``own_sizes`` large. Raises ConversionError when it cannot be read."""
        stored = self._metadata.state_dict_metadata[piece.key]
        assert isinstance(stored, TensorStorageMetadata)
        tensor = torch.empty(piece.sizes, dtype=stored.properties.dtype)
        reading = _Reading(piece, tensor)
        try:
            load({}, storage_reader=self._reader, planner=reading, no_dist=True)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise ConversionError(f"{self.path}: cannot read {piece.key}: {reason}") from error
        return tensor.reshape(piece.own_sizes)


class _Reader(FileSystemReader):
    """Knows the metadata, which torch asks for at each load: of many layers they take long."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._known


class _Reading(DefaultLoadPlanner):
    def __init__(self, piece: Piece, tensor: Tensor) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._piece, self._tensor = piece, tensor

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata[self._piece.key]
        assert isinstance(stored, TensorStorageMetadata)
        wanted = [_chunk(self._piece)]
        return LoadPlan(create_read_items_for_chunk_list(self._piece.key, stored, wanted))

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        tensor = self._tensor
        for dim, (start, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            tensor = tensor.narrow(dim, start, size)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: torch has copied into what ``resolve_tensor`` returned."""
