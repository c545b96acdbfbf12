"""Make a corpus of Python source as JSON lines, and train a byte-level BPE on it.

    python tools/make_corpus.py --output-dir data --vocab-size 8192

takes the source files of the running interpreter's standard library (no network needed) and writes

    data/corpus.jsonl      one document a line: its text under `content`, its name under `path`
    data/tokenizer/        vocab.json and merges.txt as GPT-2 has them, and tokenizer.json with
                           tokenizer_config.json, which make it a Hugging Face tokenizer
    data/corpus.json       what these were made from: a second run with the same flags does nothing

`--dataset codeparrot` takes codeparrot/codeparrot-clean-train from the Hugging Face hub instead.
Exit codes: 0 made, or up to date; 1 the source or the disk failed; 2 a flag's value cannot work.
"""

import argparse
import json
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seq1f1b_tools.interrupts import Interrupted, interruptible
from seq1f1b_tools.preprocessing.errors import (
    DATA_EXIT_CODE,
    SETTING_EXIT_CODE,
    DataError,
    SettingError,
)

if TYPE_CHECKING:
    from seq1f1b_tools.preprocessing.documents import HubRows, Row

_LOG_INTERVAL = 1000
_MIN_VOCAB_SIZE = 257  # every byte, and the end-of-document token


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = argparse.ArgumentParser(description="Make a corpus of Python source, and a BPE on it.")
    parser.add_argument("--output-dir", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--dataset",
        choices=["stdlib", "codeparrot"],
        default="stdlib",
        help="this Python's standard library, or codeparrot-clean-train from the hub",
    )
    parser.add_argument(
        "--size-mb",
        type=float,
        default=32.0,
        help="stop after this many million bytes of text, or when there is no more",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="largest vocabulary of the BPE"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="threads that train the BPE",
    )
    return parser


class Manifest:
    """What lies in the folder and what it was made from, so that a step is not done twice."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "corpus.json"
        try:
            self._steps: dict[str, Any] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._steps = {}

    def is_current(self, step: str, settings: dict[str, Any], files: Sequence[Path]) -> bool:
        """Whether the step was done with these settings and its files are as they were then."""
        done = self._steps.get(step, {})
        return done.get("settings") == settings and done.get("file_sizes") == _sizes(files)

    def record(
        self, step: str, settings: dict[str, Any], files: Sequence[Path], **facts: Any
    ) -> None:
        """Note a step as done."""
        self._steps[step] = {"settings": settings, "file_sizes": _sizes(files), **facts}
        beside = self._path.with_name(self._path.name + ".tmp")
        beside.write_text(json.dumps(self._steps, indent=2) + "\n")
        beside.replace(self._path)


def _sizes(files: Sequence[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in files if path.is_file()}


def run(args: argparse.Namespace) -> None:
    """Make what is not there yet.

    Raises:
        SettingError: a flag's value cannot work.
        DataError: the source or the disk failed.
    """
    if args.vocab_size < _MIN_VOCAB_SIZE:
        raise SettingError(
            f"--vocab-size {args.vocab_size}: at least {_MIN_VOCAB_SIZE}, for each of the 256 "
            "bytes and the end-of-document token"
        )
    for flag, value in (("--size-mb", args.size_mb), ("--workers", args.workers)):
        if not value > 0:
            raise SettingError(f"{flag} {value}: must be above 0")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / ".tmp").touch()
        (args.output_dir / ".tmp").unlink()
    except OSError as error:
        raise SettingError(
            f"--output-dir {args.output_dir}: cannot be written to: {error.strerror}"
        ) from error
    manifest = Manifest(args.output_dir)
    try:
        corpus_settings = _make_corpus(args, manifest)
        _make_tokenizer(args, manifest, corpus_settings)
    except OSError as error:
        raise DataError(f"--output-dir {args.output_dir}: {error}") from error


def _make_corpus(args: argparse.Namespace, manifest: Manifest) -> dict[str, Any]:
    path = args.output_dir / "corpus.jsonl"
    settings = {"dataset": args.dataset, "size_mb": args.size_mb}
    if args.dataset == "stdlib":
        settings["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    if manifest.is_current("corpus", settings, [path]):
        print(f"{path}: up to date", file=sys.stderr)
        return settings

    from seq1f1b_tools.preprocessing.corpus_file import PartialCorpus
    from seq1f1b_tools.preprocessing.progress import ProgressReport

    max_bytes = round(args.size_mb * 1e6)
    partial = PartialCorpus(path, settings).resume()
    rows, num_bytes = _open_rows(args.dataset, partial.source_state)
    if partial.size.num_documents:
        print(f"going on after {partial.size.num_documents:,} documents", file=sys.stderr)
    with ProgressReport(min(max_bytes, num_bytes or max_bytes), _LOG_INTERVAL) as report:
        partial.write(rows, max_bytes, report)
    size = partial.size
    if size.num_documents == 0:
        raise DataError(f"--dataset {args.dataset}: there is no document in it")
    manifest.record("corpus", settings, [path], **asdict(size))
    print(
        f"wrote {path}: {size.num_documents:,} documents, {size.text_bytes / 1e6:.1f} MB of text",
        file=sys.stderr,
    )
    return settings


def _open_rows(
    dataset: str, state: dict[str, Any] | None
) -> tuple["HubRows | Iterator[Row]", int | None]:
    """The rows, and how many bytes of text they are where that is known beforehand."""
    from seq1f1b_tools.preprocessing import documents

    if dataset == "stdlib":
        root = documents.standard_library_root()
        sizes = (path.stat().st_size for path in documents.standard_library_files(root))
        return documents.standard_library_rows(root), sum(sizes)
    print("connecting to the Hugging Face hub", file=sys.stderr)
    return documents.HubRows(dataset, state), None


def _make_tokenizer(
    args: argparse.Namespace, manifest: Manifest, corpus_settings: dict[str, Any]
) -> None:
    # read by the trainer's threads when they start
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import tokenizers

    from seq1f1b_tools.preprocessing.bpe import TOKENIZER_FILES, save_tokenizer_folder, train_bpe

    folder = args.output_dir / "tokenizer"
    files = [folder / name for name in TOKENIZER_FILES]
    settings = {
        "corpus": corpus_settings,
        "vocab_size": args.vocab_size,
        "tokenizers": tokenizers.__version__,
    }
    if manifest.is_current("tokenizer", settings, files):
        print(f"{folder}: up to date", file=sys.stderr)
        return
    print(f"training a BPE of {args.vocab_size:,} tokens", file=sys.stderr)
    corpus = args.output_dir / "corpus.jsonl"
    with open(corpus, "rb") as file:
        num_documents = sum(1 for _ in file)
    tokenizer = train_bpe(_texts(corpus), args.vocab_size, num_documents)
    beside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_tokenizer_folder(tokenizer, beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = tokenizer.get_vocab_size()
    manifest.record("tokenizer", settings, files, num_tokens=size)
    print(f"wrote {folder}: {size:,} tokens", file=sys.stderr)
    if size < args.vocab_size:
        print("that is all that a corpus of this size holds", file=sys.stderr)


def _texts(corpus: Path) -> Iterator[str]:
    with open(corpus, "rb") as file:
        for line in file:
            yield json.loads(line)["content"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; gives the exit code."""
    args = build_parser().parse_args(argv)
    try:
        with interruptible():
            run(args)
    except SettingError as error:
        print(f"make_corpus.py: error: {error}", file=sys.stderr)
        return SETTING_EXIT_CODE
    except DataError as error:
        print(f"make_corpus.py: error: {error}", file=sys.stderr)
        return DATA_EXIT_CODE
    except Interrupted as error:
        print(f"make_corpus.py: {error}: ended; the same command goes on", file=sys.stderr)
        return error.exit_code
    return 0
