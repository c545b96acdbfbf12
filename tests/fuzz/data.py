"""Cases for what reads and writes training data."""

import bz2
import gzip
import io
import json
import lzma
import random
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pyarrow import parquet
from tokenizers import Tokenizer

from megatron.adaptor.data_files import DataFileError, read_index
from seq1f1b_tools.preprocess_data import main
from seq1f1b_tools.preprocessing.bpe import save_tokenizer_folder, train_bpe
from seq1f1b_tools.preprocessing.indexed import EncodedDocuments, IndexedWriter, token_dtype
from tests.fuzz.mutate import TEXTS, some_bytes, some_json
from tests.fuzz.watch import call, expect

_WORDS = ("def f(x):", "return", "grüße", "漢字", "<|endoftext|>", "\u2028", "🙂", "a" * 40, " ")
_PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
_SIGNS = ((b"\x1f\x8b", ".gz"), (b"BZh", ".bz2"), (b"\xfd7zXZ\0", ".xz"), (b"(\xb5/\xfd", ".zst"))


class Preprocess:
    """Files of several kinds with up to two damages, and flags of which some make no sense."""

    def __init__(self, base: Path) -> None:
        texts = [json.dumps(_WORDS, ensure_ascii=False)] * 3
        save_tokenizer_folder(train_bpe(texts, 300, len(texts)), base / "tokenizer")
        self.folder = base / "tokenizer"
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.eod = self.tokenizer.token_to_id("<|endoftext|>")

    def run(self, dice: random.Random, folder: Path) -> bool:
        """Run the tool, and compare with what the files hold by other means."""
        inputs = folder / "in"
        inputs.mkdir()
        files = [self._file(dice, inputs, number) for number in range(dice.choice((1, 1, 2, 3)))]
        named = dice.choice((files, [inputs], [inputs / "*"], [inputs / "**"]))
        flags = ["--json-keys", "text", "--workers", "2"]
        flags += ["--append-eod"] if dice.random() < 0.3 else []
        skips = dice.random() < 0.4
        flags += ["--on-error", "skip"] if skips else []
        partitions = dice.choice((1, 1, 1, 2, 3))
        flags += ["--partitions", str(partitions)] if partitions > 1 else []
        flags += ["--chunk-size", str(dice.choice((1, 2, 1000)))] if dice.random() < 0.3 else []
        is_odd = dice.random() < 0.08
        if is_odd:
            odd = ("--chunk-size", "--partitions", "--workers", "--json-keys", "--lang", "--bogus")
            flags += [dice.choice(odd), dice.choice(TEXTS).replace("9" * 30, "9")]
        model = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.folder]
        if dice.random() < 0.5:
            model = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file"]
            model += [self.folder / "vocab.json", "--merge-file", self.folder / "merges.txt"]
        prefix = folder / "out" / "x"
        command = ["--input", *named, "--output-prefix", prefix, *model, *flags]
        run = call(lambda: main([str(word) for word in command]))
        if run.status != 0:
            expect(run.status in (1, 2), f"ends with {run.status!r}: {run.err[-500:]}")
            expect("error: " in run.err, f"says nothing: {run.err[-500:]}")
            expect(not list(folder.glob("out/*")), "something is left")
            return False
        if is_odd:
            return True
        documents = [d for file in sorted(files) for d in _documents(file, skips=skips)]
        self._compare(prefix, documents, "--append-eod" in flags, partitions)
        return True

    def _file(self, dice: random.Random, folder: Path, number: int) -> Path:
        rows = [{"text": _text(dice), "id": place} for place in range(dice.randrange(1, 12))]
        if dice.random() < 0.15:
            rows = [{"text": str(row["text"]), "id": row["id"]} for row in rows]
            file = folder / f"{number}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
            content = file.read_bytes()
        else:
            if dice.random() < 0.3:
                place = dice.randrange(len(rows))
                rows[place] = some_json(dice, rows[place])
            lines = [_line(row) for row in rows]
            if dice.random() < 0.2:
                place = dice.randrange(len(lines))
                lines[place] = some_bytes(dice, lines[place])
            if dice.random() < 0.1:
                lines.insert(dice.randrange(len(lines)), dice.choice((b"", b"  \t", b"\r")))
            content = dice.choice((b"", b"", b"\xef\xbb\xbf")) + b"\n".join(lines)
            suffix = dice.choice(list(_PACKERS))
            content = _PACKERS[suffix](content) * dice.choice((1, 1, 1, 2))
            suffix = suffix if dice.random() < 0.9 else dice.choice(list(_PACKERS))
            file = folder / f"{number}.jsonl{suffix}"
        if dice.random() < 0.25:
            content = some_bytes(dice, content)
        file.write_bytes(content)
        return file

    def _compare(
        self, prefix: Path, documents: list[list[str]], append_eod: bool, partitions: int
    ) -> None:
        found = _read_pair(Path(f"{prefix}_text_document"))
        expected = []
        for texts in documents:
            sequences = [ids for text in texts if (ids := self.tokenizer.encode(text).ids)]
            if sequences and append_eod:
                sequences[-1] = [*sequences[-1], self.eod]
            expected.append(tuple(map(tuple, sequences)))
        if partitions > 1:
            expect(Counter(found) == Counter(expected), "other documents")
        else:
            expect(found == expected, f"other documents: {len(found)}, not {len(expected)}")


def _text(dice: random.Random) -> Any:
    def one() -> str:
        return " ".join(dice.choices(_WORDS, k=dice.randrange(6)))

    return [one() for _ in range(dice.randrange(4))] if dice.random() < 0.1 else one()


def _line(row: Any) -> bytes:
    try:
        return json.dumps(row).encode(errors="surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * 2000


def _unpacked(content: bytes) -> bytes:
    """Unpack by other means than the tool; raises whatever the libraries raise."""
    kind = next((kind for sign, kind in _SIGNS if content.startswith(sign)), "")
    if kind == ".gz":
        return gzip.decompress(content)
    if kind == ".bz2":
        return bz2.decompress(content)
    if kind == ".xz":
        return lzma.decompress(content)
    if kind == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(
            io.BytesIO(content), read_across_frames=True
        )
        return reader.read()
    return content


def _documents(file: Path, *, skips: bool) -> list[list[str]]:
    content = file.read_bytes()
    if content.startswith(b"PAR1"):
        rows = parquet.read_table(file, columns=["text"]).to_pylist()
    else:
        text = _unpacked(content).removeprefix(b"\xef\xbb\xbf")
        rows = [_parsed(line) for line in text.split(b"\n") if line and not line.isspace()]
    documents = []
    for row in rows:
        try:
            texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
            for one in texts:
                one.encode()
        except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
            expect(skips, f"a row that holds no text is taken: {row!r:.100}")
            continue
        documents.append(texts)
    return documents


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError):
        return None


def _read_pair(prefix: Path) -> list[tuple[tuple[int, ...], ...]]:
    """Read an indexed data set by its format."""
    index = Path(f"{prefix}.idx").read_bytes()
    _, code, sequences, indices = struct.unpack_from("<QBQQ", index, 9)
    tokens = np.fromfile(f"{prefix}.bin", {8: "<u2", 4: "<i4"}[code]).tolist()
    lengths = np.frombuffer(index, "<i4", sequences, 34).tolist()
    firsts = np.frombuffer(index, "<i8", indices, 34 + 12 * sequences).tolist()
    place, all_sequences = 0, []
    for length in lengths:
        all_sequences.append(tuple(tokens[place : place + length]))
        place += length
    return [tuple(all_sequences[a:b]) for a, b in pairwise(firsts)]


class Indexed:
    """An indexed data set with up to two damages."""

    def __init__(self, base: Path) -> None:
        del base

    def run(self, dice: random.Random, folder: Path) -> bool:
        """Read the index, and, if it is taken for sound, the data set as Megatron reads it."""
        prefix = folder / "data"
        lengths = [dice.randrange(0, 9) for _ in range(dice.randrange(0, 30))]
        counts: list[int] = []
        while sum(counts) < len(lengths):
            counts.append(min(dice.randrange(0, 4), len(lengths) - sum(counts)))
        dtype = token_dtype(dice.choice((300, 70_000)))
        tokens = np.arange(sum(lengths)).astype(dtype)
        writer = IndexedWriter(str(prefix), dtype)
        writer.add(EncodedDocuments(tokens, lengths, counts))
        writer.finish()
        writer.publish()
        files = [Path(f"{prefix}.idx"), Path(f"{prefix}.bin")]
        before = [file.read_bytes() for file in files]
        for _ in range(dice.choice((0, 1, 1, 2))):
            file = dice.choice((files[0], files[0], files[1]))
            if dice.random() < 0.05:
                file.unlink(missing_ok=True)
                continue
            if file.exists():
                file.write_bytes(some_bytes(dice, file.read_bytes()))
        try:
            found = read_index(prefix)
        except DataFileError as error:
            expect(str(folder) in str(error), f"names no file: {error}")
            is_whole = [f.read_bytes() if f.exists() else b"" for f in files] == before
            expect(not (is_whole and sum(lengths)), f"a sound data set is refused: {error}")
            return False
        dataset = IndexedDataset(str(prefix))
        sizes = [len(dataset[number]) for number in range(len(dataset))]
        expect(sum(sizes) == found.num_tokens, "another number of tokens")
        expect(len(dataset) == found.num_sequences, "another number of sequences")
        expect(len(dataset.document_indices) - 1 == found.num_documents, "other documents")
        return True
