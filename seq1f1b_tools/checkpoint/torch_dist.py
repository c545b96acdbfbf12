"""Megatron's torch_dist checkpoints, written piece by piece through torch's own format.

Such a checkpoint is one of ``torch.distributed.checkpoint``: tensors in pieces, and objects. Since
torch asks its planner for one piece at a time, no more than that has to be in memory.
"""

import errno
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
    DefaultSavePlanner,
    FileSystemWriter,
    save,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from seq1f1b_tools.checkpoint.mapping import Piece
from seq1f1b_tools.checkpoint.problem import ConversionError, one_line

# It warns for every piece that there is one process, which is intended here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

TRACKER = "latest_checkpointed_iteration.txt"
_VERSION = 3.0
_COMMON = "common_state/shard_0_1"
_LINEAR = (
    *("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
    *("linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj"),
)


def write(
    folder: Path,
    pieces: Sequence[Piece],
    make: Callable[[Piece], Tensor],
    dtypes: Mapping[str, torch.dtype],
    arguments: Mapping[str, Any],
) -> None:
    """Write a release checkpoint that ``--load folder`` reads.

    ``make`` returns the tensor of a piece, ``own_sizes`` large; it is called when the piece is
    written. ``dtypes`` has the type of each key. ``arguments`` are Megatron's, for
    ``--use-checkpoint-args``.
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
            planner=_Writing(pieces, make, dtypes, objects),
            no_dist=True,
        )
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        if isinstance(reason, ConversionError | OSError):
            raise reason from None
        if "unexpected pos" in str(reason):  # torch's word for a write that was cut short
            raise OSError(errno.ENOSPC, "the disk is full", str(release)) from None
        raise ConversionError(f"{release} cannot be written: {one_line(reason)}") from error
    (release / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
    )
    (folder / TRACKER).write_text("release")


def _extra_states(pieces: Iterable[Piece]) -> Iterator[str]:
    """Name the empty states that Megatron's linear layers save beside their weights."""
    for piece in pieces:
        module, _, kind = piece.key.rpartition(".")
        if kind == "weight" and module.endswith(_LINEAR):
            axes = piece.num_axes
            place = ".".join(map(str, piece.offsets[:axes])) or "0"
            count = ".".join(map(str, piece.whole[:axes])) or "1"
            yield f"{module}._extra_state/shard_{place}_{count}"


class _Writing(DefaultSavePlanner):
    def __init__(
        self,
        pieces: Sequence[Piece],
        make: Callable[[Piece], Tensor],
        dtypes: Mapping[str, torch.dtype],
        objects: Mapping[str, Any],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._objects = objects
        self._make = make
        self._dtypes = dtypes
        self._pieces = {_index(piece): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        tensors = [
            WriteItem(
                index,
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    _chunk(piece),
                    TensorProperties(dtype=self._dtypes[piece.key]),
                    torch.Size(piece.whole),
                ),
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
        tensor = self._make(piece).to(self._dtypes[piece.key])
        return tensor.reshape(piece.sizes).contiguous()


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, torch.Size(piece.offsets))


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
