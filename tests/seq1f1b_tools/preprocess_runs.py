"""How the tests run tools/preprocess_data.py, and the slow reference that they compare with."""

import json
import sys
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

TOOLS = Path(__file__).resolve().parents[2] / "tools"

ROWS = [
    {"content": "def f(x):\n    return x + 1\n", "title": "one"},
    {"content": "", "title": "two"},
    {"content": "grüße, 漢字 and 🙂 — naïve\u2028line", "title": ""},
    {"content": "before <|endoftext|> after", "title": "<|endoftext|>"},
    {"content": ["a list. ", "", "of sentences!"], "title": []},
    {"content": "  \t\n\n   ", "title": " "},
    {"content": "class A:\n    pass\n" * 300, "title": "long"},
    {"content": "Mr. Smith saw 3.14 ships.\n\nDid he? Yes!", "title": "e.g. this one. And this."},
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*flags):
    import preprocess_data

    return preprocess_data.main([str(flag) for flag in flags])


def command(*flags):
    return [sys.executable, str(TOOLS / "preprocess_data.py"), *map(str, flags)]


def pair(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def reference(folder, rows, key, tokenizer, *, append_eod=False, partitions=1, split=None):
    """Upstream's way: a builder for each partition, documents dealt in turn, then a merge."""
    folder.mkdir()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = [IndexedDatasetBuilder(f"{folder}/{i}.bin", dtype) for i in range(partitions)]
    for number, row in enumerate(rows):
        texts = row[key] if isinstance(row[key], list) else [row[key]]
        if split is not None:
            texts = [sentence for text in texts for sentence in split(text)]
        ids, lengths = [], []
        for text in texts:
            new = tokenizer.tokenize(text)
            if len(new) > 0:
                ids += new
                lengths.append(len(new))
        if ids and append_eod:
            ids.append(tokenizer.eod)
            lengths[-1] += 1
        builders[number % partitions].add_document(ids, lengths)
    for number, builder in enumerate(builders):
        builder.finalize(f"{folder}/{number}.idx")
    if partitions == 1:
        return pair(f"{folder}/0")
    merged = IndexedDatasetBuilder(f"{folder}/merged.bin", dtype)
    for number in range(partitions):
        merged.add_index(f"{folder}/{number}")
    merged.finalize(f"{folder}/merged.idx")
    return pair(f"{folder}/merged")
