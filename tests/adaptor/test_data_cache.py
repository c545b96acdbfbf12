"""Runs that start together on one new cache, or after one was killed in it, and damaged data."""

import pytest

from tests.programs import ask

# Each step builds the samples of a data set in processes that start together, and answers with
# what each of them got: some samples, or an error. Before, files are cut to some bytes or written.
_PROGRAM = """
import glob, json, os, sys
from argparse import Namespace
from pathlib import Path
from megatron.adaptor import install
install()
import numpy, torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def make(prefix, documents):
    if Path(prefix + ".idx").exists():
        return
    Path(prefix).parent.mkdir(parents=True)
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    for number in range(documents):
        builder.add_document(torch.arange(20 + number % 7), [20 + number % 7])
    builder.finalize(prefix + ".idx")

def build(prefix, split):
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=16, blend=([prefix], None), split=split,
        path_to_cache=prefix + ".cache", reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        tokenizer=Namespace(vocab_size=100, eod=99, pad=0, unique_identifiers={}),
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, (20000, 100, 0), lambda: True, config)
    samples = builder.build()[0]
    return [samples[i]["tokens"].sum().item() for i in range(0, 20000, 4001)]

def together(number, prefix, split):
    start, go = os.pipe()
    ends = []
    for _ in range(number):
        result, end = os.pipe()
        ends.append(result)
        if os.fork() == 0:
            os.close(go)
            os.read(start, 1)  # which ends when the pipe is closed
            try:
                found = build(prefix, split)
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            os.write(end, json.dumps(found).encode())
            os._exit(0)
        os.close(end)
    os.close(go)
    return [json.loads(open(end).read()) for end in ends]

answers = []
for prefix, documents, number, split, damage in json.loads(sys.stdin.read()):
    make(prefix, documents)
    for pattern, change in damage.items():
        (file,) = map(Path, glob.glob(pattern))
        if isinstance(change, str):
            file.write_text(change)
        else:
            file.write_bytes(file.read_bytes()[:change])
    answers.append(together(number, prefix, split))
print("ANSWER" + json.dumps(answers))
"""
RUNS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def built(folder):
    """Return what each step got: by name, what each of its processes got."""
    together = str(folder / "together" / "data")
    killed = {
        f"{together}.cache/*train-shuffle_index.npy": 1000,
        f"{together}.cache/*train.lock": "being built",
    }
    steps = {
        "together": (together, 400, RUNS, "100,0,0", {}),
        "killed": (together, 400, RUNS, "100,0,0", killed),
        "default split": (str(folder / "few" / "data"), 171, 1, "969,30,1", {}),
        "halves": (str(folder / "one" / "data"), 1, 1, "50,50,0", {}),
        "damaged": (together, 400, 1, "100,0,0", {f"{together}.idx": 1000}),
    }
    return dict(zip(steps, ask(_PROGRAM, list(steps.values())), strict=True))


def test_runs_that_start_together_build_once(built):
    first, *others = built["together"]
    assert isinstance(first, list), first
    assert len(set(first)) > 1
    assert others == [first] * (RUNS - 1)


def test_what_a_killed_run_has_left_is_built_anew(built, folder):
    assert built["killed"] == built["together"]
    (lock,) = (folder / "together" / "data.cache").glob("*.lock")
    assert lock.read_text() == ""


@pytest.mark.parametrize(
    "step, documents, split, part",
    [("default split", 171, "969,30,1", "test"), ("halves", 1, "50,50,0", "train")],
)
def test_a_part_without_documents_is_refused(built, step, documents, split, part):
    (error,) = built[step]
    assert f"of its {documents} documents, --split {split} leaves no token for {part}" in error
    assert "give that part more or nothing (--split 100,0,0)" in error


def test_a_damaged_index_is_refused(built, folder):
    (error,) = built["damaged"]
    assert error.startswith(f"DataFileError: {folder}/together/data.idx: has 1000 bytes, and ")
