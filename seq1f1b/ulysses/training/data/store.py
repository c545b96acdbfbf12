"""Encoded documents on disk: made once, mapped into memory by every rank."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seq1f1b.ulysses.training.data.encode import Document
from seq1f1b.ulysses.training.data.records import source_files
from seq1f1b.ulysses.training.recipe import DataSettings

_COMPARED = 1 << 18


@dataclass(frozen=True)
class Store:
    """tokens: of all documents, one behind the other. learned: which of them are predicted.

    bounds: where each document begins, and the end of the last.
    """

    tokens: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    bounds: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.bounds)

    def digest(self) -> str:
        """Return a digest of the documents' lengths, and of the first and the last tokens."""
        digest = hashlib.sha256(self.bounds.tobytes())
        for part in (self.tokens[:_COMPARED], self.tokens[-_COMPARED:]):
            digest.update(part.tobytes())
        return digest.hexdigest()[:12]

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Map a store that ``write`` made."""
        tokens, learned, bounds = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "learned", "bounds")
        )
        return cls(tokens, learned, bounds)


def write(folder: Path, documents: Iterable[Document]) -> None:
    """Write documents of at least two tokens; a folder that is there is complete.

    One token has nothing to predict. Memory grows with the number of tokens, at 5 bytes each.
    """
    tokens: list[npt.NDArray[np.int32]] = []
    learned: list[npt.NDArray[np.bool_]] = []
    lengths = []
    for document in documents:
        if len(document.tokens) > 1:
            tokens.append(np.asarray(document.tokens, dtype=np.int32))
            learned.append(np.asarray(document.learned, dtype=np.bool_))
            lengths.append(len(document.tokens))
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    empty = (np.zeros(0, np.int32), np.zeros(0, np.bool_))
    np.save(partial / "tokens.npy", np.concatenate([empty[0], *tokens]))
    np.save(partial / "learned.npy", np.concatenate([empty[1], *learned]))
    np.save(partial / "bounds.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    partial.rename(folder)


def fingerprint(settings: DataSettings, tokenizer_name: str) -> str:
    """Return a name that changes with the files, what is read from them, and the tokenizer."""
    facts = settings.model_dump(exclude={"max_length", "packing", "too_long"})
    sources = [settings.source] if isinstance(settings.source, str) else settings.source
    files = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for name in sources
        for path in source_files(name)
    ]
    text = json.dumps([facts, files, tokenizer_name], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
