"""The data that every run trains on."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from seq1f1b.errors import Seq1F1BError
from seq1f1b_tools.sweep.settings import ROOT, Settings

_JSON_KEY = "content"


class CorpusError(Seq1F1BError, RuntimeError):
    """The data could not be made."""


@dataclass(frozen=True)
class Corpus:
    """Where the data of one data set, size and vocabulary lies."""

    folder: Path

    @classmethod
    def of(cls, settings: Settings) -> "Corpus":
        """Return the place of the data that ``settings`` ask for."""
        size = f"{settings.corpus_mb:g}mb"
        return cls(settings.data / f"{settings.dataset}-{size}-bpe{settings.vocab_size}")

    @property
    def documents(self) -> Path:
        """JSON lines."""
        return self.folder / "corpus.jsonl"

    @property
    def tokenizer(self) -> Path:
        """A Hugging Face tokenizer."""
        return self.folder / "tokenizer"

    @property
    def prefix(self) -> Path:
        """Megatron's --data-path."""
        return self.folder / f"tokens_{_JSON_KEY}_document"

    @property
    def cache(self) -> Path:
        """Where Megatron keeps the order of the samples."""
        return self.folder / "cache"

    @property
    def is_tokenized(self) -> bool:
        """Whether the tokens are there and no older than what they were made from."""
        made = [self.prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
        sources = [self.documents, self.tokenizer / "tokenizer.json"]
        if not all(path.is_file() for path in (*made, *sources)):
            return False
        return min(map(_age, made)) >= max(map(_age, sources))


def prepare(settings: Settings, run: Callable[[list[str]], int] | None = None) -> Corpus:
    """Make what is missing of the corpus, its tokenizer and its tokens.

    ``run`` runs a command and returns its exit status.

    Raises:
        CorpusError: one of the tools failed; it has said why.
    """
    corpus = Corpus.of(settings)
    run = run or subprocess.call
    _run(
        run,
        "make_corpus.py",
        *("--output-dir", corpus.folder, "--dataset", settings.dataset),
        *("--size-mb", settings.corpus_mb, "--vocab-size", settings.vocab_size),
    )
    if not corpus.is_tokenized:
        _run(
            run,
            "preprocess_data.py",
            *("--input", corpus.documents, "--json-keys", _JSON_KEY, "--append-eod"),
            *("--output-prefix", corpus.folder / "tokens"),
            *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", corpus.tokenizer),
        )
    return corpus


def _run(run: Callable[[list[str]], int], tool: str, *arguments: object) -> None:
    status = run([sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)])
    if status:
        raise CorpusError(f"tools/{tool} ended with status {status}: the data could not be made")


def _age(path: Path) -> float:
    return path.stat().st_mtime
