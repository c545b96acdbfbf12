"""Tokenize JSON lines into Megatron's indexed dataset, with the flags of Megatron's own tool.

    python tools/preprocess_data.py --input data/corpus.jsonl --json-keys content \
        --output-prefix data/code --tokenizer-type GPT2BPETokenizer \
        --vocab-file data/tokenizer/vocab.json --merge-file data/tokenizer/merges.txt \
        --append-eod --workers 2

writes data/code_content_document.bin and .idx, for `--data-path data/code_content_document`.
docs/data.md describes the flags and the format. Exit codes: 0 written; 1 the input, the disk or a
worker failed; 2 a flag's value cannot work. In both other cases nothing is left behind.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from seq1f1b.processes import end_now
from seq1f1b_tools.interrupts import Interrupted, ignore_interrupts, interruptible
from seq1f1b_tools.preprocessing.errors import (
    DATA_EXIT_CODE,
    SETTING_EXIT_CODE,
    DataError,
    SettingError,
)

if TYPE_CHECKING:
    from seq1f1b_tools.preprocessing.encode import DocumentEncoder
    from seq1f1b_tools.preprocessing.indexed import IndexedWriter
    from seq1f1b_tools.preprocessing.progress import ProgressReport
    from seq1f1b_tools.preprocessing.source import JsonLines

_BATCH_BYTES_PER_WORKER = 1 << 19


def build_parser() -> argparse.ArgumentParser:
    """The tool's flags; those that only some tokenizers know are left to Megatron's parser."""
    parser = argparse.ArgumentParser(
        description="Tokenize JSON lines into Megatron's indexed dataset.", allow_abbrev=False
    )
    group = parser.add_argument_group("input data")
    add = group.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="JSON lines or parquet: files, folders, pipes, patterns such as 'deep/**/*.jsonl'; "
        ".gz, .bz2, .xz and .zst are unpacked",
    )
    add("--json-keys", nargs="+", default=["text"], help="keys of a record whose text is tokenized")
    add("--split-sentences", action="store_true", help="split documents into sentences")
    add("--keep-newlines", action="store_true", help="keep newlines between sentences")
    add("--lang", default="english", help="language for --split-sentences")
    add("--on-error", choices=["stop", "skip"], default="stop", help="what to do at a bad line")
    group = parser.add_argument_group("tokenizer")
    add = group.add_argument
    add("--tokenizer-type", required=True, help="as in Megatron, such as GPT2BPETokenizer")
    add("--tokenizer-model", help="folder, file or hub name")
    add("--vocab-file", "--vocab", help="vocab.json")
    add("--merge-file", help="merges.txt")
    add("--append-eod", action="store_true", help="end each document with the eod token")
    group = parser.add_argument_group("output data")
    add = group.add_argument
    add("--output-prefix", required=True, help="path of the output without _KEY_document.bin")
    add("--dataset-impl", choices=["mmap"], default="mmap", help="the format; Megatron has one")
    group = parser.add_argument_group("runtime")
    add = group.add_argument
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=_positive, default=cores, help="threads, or processes where needed")
    add("--chunk-size", type=_positive, default=0, help="documents in a batch (default: by bytes)")
    add("--partitions", type=_positive, default=1, help="split documents into this many partitions")
    add(
        "--keep-sequential-samples",
        action="store_true",
        help="keep the documents' order with --partitions",
    )
    add("--log-interval", type=_positive, default=1000, help="documents between progress lines")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run(args: argparse.Namespace, other_flags: Sequence[str]) -> None:
    """Do what the flags ask for.

    Raises:
        SettingError: a flag's value cannot work.
        DataError: the input, the disk or a worker failed.
    """
    # read by the tokenizer's threads when they start
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if args.split_sentences else "true"

    # imported here, after the lines above and after the flags: --help needs none of it
    from seq1f1b_tools.preprocessing.encode import DocumentEncoder
    from seq1f1b_tools.preprocessing.indexed import IndexedWriter, token_dtype
    from seq1f1b_tools.preprocessing.inputs import find_inputs
    from seq1f1b_tools.preprocessing.source import JsonLines
    from seq1f1b_tools.preprocessing.tokenizer import load_tokenizer

    if len(set(args.json_keys)) < len(args.json_keys):
        raise SettingError(f"--json-keys {' '.join(args.json_keys)}: a key stands there twice")
    for key in args.json_keys:
        if "/" in key or "\0" in key:
            raise SettingError(f"--json-keys {key}: is part of a file's name, which has no /")
    files, remarks = find_inputs(args.input)
    for remark in remarks:
        print(remark, file=sys.stderr)
    tokenizer = load_tokenizer(args, other_flags)
    if args.append_eod and tokenizer.eod is None:
        raise SettingError("--append-eod: this tokenizer has no end-of-document token")
    source = JsonLines(
        files,
        args.json_keys,
        skip_bad_lines=args.on_error == "skip",
        batch_documents=args.chunk_size,
        batch_bytes=_BATCH_BYTES_PER_WORKER * args.workers,
    )
    split = None
    if args.split_sentences:
        from seq1f1b_tools.preprocessing.sentences import sentence_splitter

        split = sentence_splitter(args.lang, args.keep_newlines)
    encoder = DocumentEncoder(tokenizer, tokenizer.eod if args.append_eod else None, split)
    partitions = 1 if args.keep_sequential_samples else args.partitions
    dtype = token_dtype(tokenizer.vocab_size)
    writers: list[IndexedWriter] = []
    try:
        for key in args.json_keys:
            prefix = f"{args.output_prefix}_{key}_{'sentence' if split else 'document'}"
            writers.append(IndexedWriter(prefix, dtype, partitions))
        report = _fill(writers, source, encoder, args)
        ignore_interrupts()  # too late: the pairs appear whole
        for writer in writers:
            writer.publish()
    except OSError as error:
        raise DataError(f"--output-prefix {args.output_prefix}: {error}") from error
    finally:
        for writer in writers:
            writer.discard()
    _tell(writers, source, report, args)


def _fill(
    writers: list["IndexedWriter"],
    source: "JsonLines",
    encoder: "DocumentEncoder",
    args: argparse.Namespace,
) -> "ProgressReport":
    from seq1f1b_tools.preprocessing.encode import encoding_processes, encoding_threads
    from seq1f1b_tools.preprocessing.progress import ProgressReport

    if encoder.is_threaded:
        encoding = encoding_threads(encoder)
    else:
        encoding = encoding_processes(encoder, args.workers)
    report = ProgressReport(source.total_bytes, args.log_interval)
    with encoding as in_order, report:
        for batch, documents_of_keys in in_order(source):
            for writer, documents in zip(writers, documents_of_keys, strict=True):
                writer.add(documents)
            report.advance(len(batch.documents), batch.num_bytes, batch.position)
    for writer, key in zip(writers, args.json_keys, strict=True):
        if writer.num_tokens == 0:
            raise DataError(f"--input: there is no text under the key {key!r}")
        writer.finish()
    return report


def _tell(
    writers: list["IndexedWriter"],
    source: "JsonLines",
    report: "ProgressReport",
    args: argparse.Namespace,
) -> None:
    for writer in writers:
        size = f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens"
        print(f"wrote {writer.bin_path} and .idx: {size}", file=sys.stderr)
    print(
        f"{report.num_bytes / 1e6:.1f} MB in {report.seconds:.3f} s ({report.speed:.1f} MB/s), "
        f"{args.workers} workers, {source.num_skipped} lines skipped",
        file=sys.stderr,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; gives the exit code."""
    args, other_flags = build_parser().parse_known_args(argv)
    try:
        with interruptible():
            run(args, other_flags)
    except SettingError as error:
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
        return SETTING_EXIT_CODE
    except DataError as error:
        print(f"preprocess_data.py: error: {error}. Nothing was written", file=sys.stderr)
        return DATA_EXIT_CODE
    except Interrupted as error:
        print(f"preprocess_data.py: {error}: ended, nothing was written", file=sys.stderr)
        return error.exit_code
    return 0


def command() -> NoReturn:
    """Run the tool and end the process with its exit code.

    Threads of an executor whose worker was killed may wait for ever at a usual exit.
    """
    end_now(main())
