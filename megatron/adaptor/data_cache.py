"""Indices of samples that runs build once, and data sets that are looked at before they are read.

Megatron writes the indices of a data set into ``--data-cache-path`` file by file, and believes what
it finds there: a run that starts meanwhile reads half of a file, and so does every later one when
the first was killed.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.adaptor.data_files import DataFileError, read_index
from megatron.adaptor.patches import Patch

logger = logging.getLogger(__name__)

_DATASETS = "megatron.core.datasets"
_BUILDING = "being built"


def patches() -> list[Patch]:
    """Return what is replaced where Megatron builds data sets."""
    data_set = f"{_DATASETS}.gpt_dataset:GPTDataset"
    blend = f"{_DATASETS}.blended_dataset:BlendedDataset"
    return [
        Patch(f"{data_set}.build_low_level_dataset", build_low_level_dataset),
        Patch(f"{data_set}._get_num_epochs", get_num_epochs),
        Patch(f"{data_set}._build_document_sample_shuffle_indices", build_sample_indices),
        Patch(f"{blend}._build_indices", build_blend_indices),
    ]


def build_low_level_dataset(original: Callable[..., Any], dataset_path: str, config: Any) -> Any:
    """Refuse a data set that is damaged, or whose files are not of one data set."""
    has_index = not config.sequences_per_dataset and "://" not in dataset_path
    if has_index and _builds():
        read_index(dataset_path)
    return original(dataset_path, config)


def get_num_epochs(original: Callable[..., Any], data_set: Any, num_tokens_per_epoch: int) -> int:
    """Refuse a part of a data set without a token, in which Megatron would look for ever."""
    if num_tokens_per_epoch < 1:
        split = data_set.index_split.name
        documents = data_set.numel_low_level_dataset(data_set.dataset)
        raise DataFileError(
            f"{data_set.dataset_path}: of its {documents} documents, --split "
            f"{data_set.config.split} leaves no token for {split}: give that part more or nothing "
            "(--split 100,0,0), or use more documents"
        )
    return original(data_set, num_tokens_per_epoch)


def build_sample_indices(original: Callable[..., Any], data_set: Any) -> Any:
    """Let one run at a time build the indices of a data set, and the others load them."""
    config = data_set.config
    folder = config.path_to_cache
    if folder is None and not config.mock:
        folder = os.path.join(
            data_set.dataset.path_prefix, "cache", f"{type(data_set).__name__}_indices"
        )
    with _building(folder, data_set, data_set.index_split):
        return original(data_set)


def build_blend_indices(original: Callable[..., Any], data_set: Any) -> Any:
    """Let one run at a time build the indices of a blend, and the others load them."""
    with _building(data_set.config.path_to_cache, data_set, data_set.split):
        return original(data_set)


@contextmanager
def _building(folder: str | None, data_set: Any, split: Any) -> Iterator[None]:
    """Hold the lock of a data set's indices, and remove those that an earlier run left half built.

    Only the rank that builds needs it: the others wait for that rank, which leaves whole files.
    """
    config = data_set.config
    if folder is None or not _builds() or config.defer_npy_index_mmap:
        yield
        return
    base = f"{data_set.unique_description_hash}-{type(data_set).__name__}-{split.name}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = Path(folder, f"{base}.lock").open("a+")  # noqa: SIM115
    except OSError:  # nothing can be built here, but perhaps loaded
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start one run first", lock.name, error)
            yield
            return
        lock.seek(0)
        if lock.read():
            for file in Path(folder).glob(f"{base}-*"):
                file.unlink()
        lock.truncate(0)
        if not any(Path(folder).glob(f"{base}-*.npy")):
            lock.write(_BUILDING)
            lock.flush()
        yield
        lock.truncate(0)


def _builds() -> bool:
    """Whether this rank builds what is not in the cache."""
    return not dist.is_initialized() or dist.get_rank() == 0
