"""Checkpoints that are damaged or hostile: named in one line, never loaded, never run."""

import io
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from tests.seq1f1b_tools.checkpoint.tiny_models import convert, tensors_of


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """A copy of the Llama checkpoint, to be damaged."""
    return shutil.copytree(checkpoints["llama"], tmp_path / "checkpoint")


@pytest.fixture
def to_hf(models, tmp_path):
    """Convert a checkpoint to a folder, or return the message of the refusal."""

    def run(checkpoint):
        output = tmp_path / "out"
        shutil.rmtree(output, ignore_errors=True)
        run = convert(
            *("megatron-to-hf", "--megatron", checkpoint, "--hf-config", models["llama"][0]),
            *("--output", output),
        )
        if run.exit_code == 0:
            return output, ""
        assert run.exit_code == 2, run.exception
        assert not list(tmp_path.glob("out*"))
        return None, run.stderr[run.stderr.index("error: ") :]

    return run


def load(checkpoint):
    return pickle.loads((checkpoint / "release" / ".metadata").read_bytes())


def store(checkpoint, metadata):
    (checkpoint / "release" / ".metadata").write_bytes(pickle.dumps(metadata))


class Malice:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["whole", "an entry", "storage_meta"])
def test_a_description_cannot_run_code(checkpoint, to_hf, tmp_path, place):
    mark = tmp_path / "mark"
    metadata = load(checkpoint)
    if place == "whole":
        metadata = Malice(mark)
    elif place == "an entry":
        metadata.state_dict_metadata["x"] = Malice(mark)
    else:
        metadata.storage_meta = Malice(mark)
    store(checkpoint, metadata)
    _, message = to_hf(checkpoint)
    assert "holds posix.system, which no description of tensors needs" in message
    assert not mark.exists()


def test_a_tensor_cannot_run_code(checkpoint, to_hf, tmp_path):
    """The same in the pickle of a tensor, which is one part of a file."""
    mark = tmp_path / "mark"
    metadata = load(checkpoint)
    where = next(v for k, v in metadata.storage_data.items() if k.fqn.endswith("embeddings.weight"))
    file = checkpoint / "release" / "hostile.distcp"
    torch.save({"x": Malice(mark)}, file)
    where.relative_path, where.offset, where.length = file.name, 0, file.stat().st_size
    store(checkpoint, metadata)
    _, message = to_hf(checkpoint)
    assert "cannot read" in message
    assert not mark.exists()


def test_a_pickled_model_cannot_run_code(models, tmp_path):
    folder, mark = tmp_path / "folder", tmp_path / "mark"
    folder.mkdir()
    shutil.copy(models["llama"][0] / "config.json", folder)
    torch.save({"x": Malice(mark)}, folder / "pytorch_model.bin")
    run = convert("hf-to-megatron", "--hf", folder, "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert "pytorch_model.bin cannot be loaded safely" in run.stderr
    assert not mark.exists()


@pytest.mark.parametrize("path", ["../../secret", "/etc/passwd", "..", "a/b", 3])
def test_a_description_cannot_name_files_elsewhere(checkpoint, to_hf, path):
    metadata = load(checkpoint)
    for key, where in metadata.storage_data.items():
        if key.fqn == "output_layer.weight":
            where.relative_path = path
    store(checkpoint, metadata)
    _, message = to_hf(checkpoint)
    assert "output_layer.weight lies in" in message


def _overlap(metadata):
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks
    chunks[1].offsets = chunks[0].offsets


def _gap(metadata):
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()


def _shift(metadata):
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks
    chunks[1].sizes = torch.Size((1, 95, 32))


def _same_bytes(metadata):
    first, second = [
        where for key, where in metadata.storage_data.items() if "fc1.weight" in key.fqn
    ]
    second.relative_path, second.offset = first.relative_path, first.offset


def _no_tensor(metadata):
    metadata.state_dict_metadata["output_layer.weight"] = BytesStorageMetadata()


def _other_type(metadata):
    properties = metadata.state_dict_metadata["output_layer.weight"].properties
    properties.dtype = torch.bfloat16


def _no_place(metadata):
    key = next(key for key in metadata.storage_data if key.fqn == "output_layer.weight")
    del metadata.storage_data[key]


def _compressed(metadata):
    key = next(key for key in metadata.storage_data if key.fqn == "output_layer.weight")
    metadata.storage_data[key].transform_descriptors = ["zstd"]


def _nothing(metadata):
    metadata.storage_data = None


@pytest.mark.parametrize(
    "damage,message",
    [
        (_overlap, "lies where another tensor does"),
        (_gap, "a part of it is missing"),
        (_shift, "a part of it is missing"),
        (_same_bytes, "lies where another tensor does"),
        (_no_tensor, "has no tensor output_layer.weight"),
        (_other_type, "holds no tensor of torch.bfloat16 there"),
        (_no_place, "is damaged"),
        (_compressed, "is stored compressed"),
        (_nothing, "is damaged"),
    ],
)
def test_a_description_that_cannot_be_true(checkpoint, to_hf, damage, message):
    metadata = load(checkpoint)
    damage(metadata)
    store(checkpoint, metadata)
    _, text = to_hf(checkpoint)
    assert message in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("seed", range(60))
def test_a_flipped_bit_is_found_or_does_not_matter(checkpoint, to_hf, models, seed):
    random.seed(seed)
    files = sorted((checkpoint / "release").iterdir())
    file = random.choice([f for f in files if f.suffix == ".distcp" or f.name == ".metadata"])
    content = bytearray(file.read_bytes())
    place = random.randrange(len(content))
    content[place] ^= 1 << random.randrange(8)
    file.write_bytes(content)
    output, message = to_hf(checkpoint)
    if output is None:
        assert message.count("\n") == 1
    else:
        found, expected = tensors_of(output), tensors_of(models["llama"][0])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name}, byte {place} of {file.name}"


def test_a_flipped_bit_of_a_weight_names_the_tensor(checkpoint, to_hf):
    metadata = load(checkpoint)
    where = next(v for k, v in metadata.storage_data.items() if k.fqn == "output_layer.weight")
    file = checkpoint / "release" / where.relative_path
    content = bytearray(file.read_bytes())
    part = bytes(content[where.offset : where.offset + where.length])
    weights = torch.load(io.BytesIO(part), weights_only=True).numpy().tobytes()
    content[where.offset + part.index(weights) + 777] ^= 4
    file.write_bytes(content)
    _, message = to_hf(checkpoint)
    assert "cannot read output_layer.weight" in message
    assert "check sum of archive/data/0 does not match" in message


def test_a_damaged_pickled_model_is_found(models, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(models["llama"][0] / "config.json", folder)
    file = folder / "pytorch_model.bin"
    torch.save(tensors_of(models["llama"][0]), file)
    with zipfile.ZipFile(file) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(file.read_bytes())
    content[member.header_offset + 400] ^= 1
    file.write_bytes(content)
    run = convert("hf-to-megatron", "--hf", folder, "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert f"{file} is damaged" in run.stderr


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"-3", b"1e9", b"\xff\xfe", b"9" * 5000, b"../../etc", b"[/x]", b"iter_0000002"],
)
def test_a_tracker_that_names_no_iteration(checkpoint, to_hf, content):
    (checkpoint / "latest_checkpointed_iteration.txt").write_bytes(content)
    _, message = to_hf(checkpoint)
    assert "neither the number of an iteration nor release" in message


def test_a_tracker_of_an_iteration_that_is_not_there(checkpoint, to_hf):
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("7")
    _, message = to_hf(checkpoint)
    assert "iter_0000007 is no checkpoint in Megatron's torch_dist format" in message


@pytest.mark.parametrize("content", [b"", b"x", b"\x80\x04.", b"\x80\x04N.", b"(lp0\n.", b"I1\n."])
def test_a_description_that_is_none(checkpoint, to_hf, content):
    (checkpoint / "release" / ".metadata").write_bytes(content)
    _, message = to_hf(checkpoint)
    assert ".metadata is damaged" in message


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "[link=x]", "a\nb"])
def test_signs_of_the_terminals_markup_are_only_shown(models, tmp_path, name):
    run = convert("hf-to-megatron", "--hf", tmp_path / name, "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert f"{name}: no such folder" in run.stderr
    folder = shutil.copytree(models["llama"][0], tmp_path / name)
    run = convert("hf-to-megatron", "--hf", folder, "--output", tmp_path / f"{name}.out")
    assert run.exit_code == 0, run.stderr


def test_what_a_killed_conversion_left_is_cleared_away(checkpoint, to_hf, tmp_path):
    left = tmp_path / "out.partial" / "content"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    (left.parent / ".seq1f1b-lock").touch()
    output, _ = to_hf(checkpoint)
    assert output is not None
    assert not left.parent.exists()


def test_a_folder_of_somebody_else_is_not_cleared_away(models, tmp_path):
    own = tmp_path / "out.partial" / "content"
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("years")
    run = convert("hf-to-megatron", "--hf", models["llama"][0], "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert "out.partial is in the way: remove it" in run.stderr
    assert (own / "thesis.txt").read_text() == "years"


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    models, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    run = convert("hf-to-megatron", "--hf", models["llama"][0], "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert "GiB, and the disk of" in run.stderr
    assert list(tmp_path.iterdir()) == []
