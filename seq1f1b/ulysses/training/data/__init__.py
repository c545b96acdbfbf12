"""The data of a run: records, tokens, rows."""

from seq1f1b.ulysses.training.data.packing import make_rows
from seq1f1b.ulysses.training.data.prepare import prepare_rows
from seq1f1b.ulysses.training.data.records import DataError
from seq1f1b.ulysses.training.data.rows import Order, PackedRows, RowBatch

__all__ = ["DataError", "Order", "PackedRows", "RowBatch", "make_rows", "prepare_rows"]
