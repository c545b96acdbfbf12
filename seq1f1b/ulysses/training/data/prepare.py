"""Encode a run's data once, on one process of each node, and open it on all."""

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from seq1f1b.agreement import raise_on_all
from seq1f1b.ulysses.training.data.encode import Encoder
from seq1f1b.ulysses.training.data.packing import make_rows
from seq1f1b.ulysses.training.data.records import DataError, read_records
from seq1f1b.ulysses.training.data.rows import PackedRows
from seq1f1b.ulysses.training.data.store import Store, fingerprint, write
from seq1f1b.ulysses.training.recipe import DataSettings

_log = logging.getLogger(__name__)


def prepare_rows(settings: DataSettings, tokenizer: Any, name: str, cache: Path) -> PackedRows:
    """Return the run's rows; ``cache`` holds encoded documents for later runs.

    name: of the tokenizer. Rank 0 encodes; where its files are not seen, another node's first
    process does. Raises DataError, on all ranks.
    """
    folder, error = cache, ""
    try:
        folder = cache / fingerprint(settings, name)
    except DataError as found:
        error = str(found)
    raise_on_all(error, DataError)
    for may_write in (_rank() == 0, _local_rank() == 0):
        error = ""
        if may_write and not folder.exists():
            try:
                encoder = Encoder(settings, tokenizer)
                records = read_records(settings.source, settings.split)
                write(folder, (encoder.encode(record) for record in records))
            except DataError as found:
                error = str(found)
            except OSError as found:
                error = f"{found.filename or folder}: {found.strerror or found}"
        raise_on_all(error, DataError)
    store = Store.open(folder)
    rows = make_rows(store.lengths, settings.max_length, settings.packing, settings.too_long)
    _log.info(
        "%d documents of %d tokens in %d rows of at most %d",
        len(store.lengths),
        len(store.tokens),
        len(rows),
        settings.max_length,
    )
    return PackedRows(store, rows)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
