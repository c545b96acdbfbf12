"""Converted checkpoints train on, come back as they were, and appear whole or not at all."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from seq1f1b_tools.preprocessing.indexed import EncodedDocuments, IndexedWriter, token_dtype
from tests.distributed.training_runs import run_ranks
from tests.selection import mostly_long
from tests.seq1f1b_tools.checkpoint.tiny_models import (
    FAMILIES,
    SIZES,
    convert,
    converted,
    flags_of,
    make,
    tensors_of,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", mostly_long(["qwen3", "deepseek_v3"], default=["deepseek_v3"]))
def test_a_converted_model_goes_on_training(tmp_path, models, checkpoints, name):
    flags = shlex.split(
        "--ckpt-format torch_dist --pipeline-model-parallel-size 2 --seq1f1b-splits 2 "
        "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-4 "
        "--mock-data --tokenizer-type NullTokenizer --eval-iters 1 --eval-interval 2 "
        "--save-interval 2 --padded-vocab-size 128"
    )
    run = run_ranks(
        2,
        *(ROOT / "pretrain_gpt.py", "--load", checkpoints[name], "--finetune"),
        *(*flags_of(checkpoints[name]), *flags, "--save", tmp_path / "saved"),
        *("--seq1f1b-metrics-file", tmp_path / "metrics.jsonl"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "successfully loaded checkpoint" in run.stdout
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    flags = ("--hf-config", models[name][0], "--output", tmp_path / "trained")
    back = converted("megatron-to-hf", "--megatron", tmp_path / "saved", *flags)
    assert "58 rows beyond the vocabulary" in back.stderr
    before, after = tensors_of(models[name][0]), tensors_of(tmp_path / "trained")
    for key, tensor in before.items():
        assert (after[key] - tensor).abs().max() < 3e-3, key
        assert "experts." in key or not torch.equal(after[key], tensor), key


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_vocabulary_larger_than_the_tokenizer(tmp_path, tokenizer_folder):
    """As Qwen's: the first loss is that of transformers, and every row comes back."""
    model = make("qwen2", tmp_path / "hf", vocab_size=450, tie_word_embeddings=False)
    assert len(AutoTokenizer.from_pretrained(tokenizer_folder)) < 450
    converted(
        *("hf-to-megatron", "--hf", tmp_path / "hf", "--output", tmp_path / "megatron"),
        *("--tensor-parallel", 2),
    )
    tokens = torch.randint(0, 400, (16,), generator=torch.Generator().manual_seed(1))
    writer = IndexedWriter(str(tmp_path / "data"), token_dtype(400))
    writer.add(EncodedDocuments(tokens.repeat(50).numpy().astype("<u2"), [16] * 50, [1] * 50))
    writer.finish()
    writer.publish()
    flags = shlex.split(
        f"--ckpt-format torch_dist --tensor-model-parallel-size 2 --seq-length 16 "
        f"--micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-30 --eval-iters 0 "
        f"--eval-interval 1 "
        f"--split 100,0,0 --data-path {tmp_path / 'data'} --data-cache-path {tmp_path / 'cache'} "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer_folder} "
        f"--save {tmp_path / 'saved'} --save-interval 1 --seq1f1b-splits 2 --weight-decay 0 "
        f"--seq1f1b-metrics-file {tmp_path / 'metrics.jsonl'}"
    )
    run = run_ranks(
        2,
        *(ROOT / "pretrain_gpt.py", "--load", tmp_path / "megatron", "--finetune"),
        *(*flags_of(tmp_path / "megatron"), *flags),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    loss = json.loads((tmp_path / "metrics.jsonl").read_text())["lm_loss"]
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, tokens.roll(-1))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    back = converted(
        *("megatron-to-hf", "--megatron", tmp_path / "saved", "--hf-config", tmp_path / "hf"),
        *("--output", tmp_path / "back"),
    )
    assert "beyond the vocabulary" not in back.stderr
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(tmp_path, models, checkpoints, name):
    source, _ = models[name]
    converted(
        *("megatron-to-hf", "--megatron", checkpoints[name], "--hf-config", source),
        *("--output", tmp_path / "back", "--max-shard-gib", 0.001),
    )
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()


def test_hugging_face_loads_several_shards(tmp_path, models, checkpoints):
    import transformers

    source, model = models["mixtral"]
    script = (
        "from pathlib import Path\n"
        "from seq1f1b_tools.checkpoint import huggingface, mapping, torch_dist_reader\n"
        "from seq1f1b_tools.checkpoint.families import read_shape\n"
        f"source, folder = Path({str(source)!r}), Path({str(tmp_path / 'shards')!r})\n"
        "pieces = mapping.pieces(read_shape(source))\n"
        f"read = torch_dist_reader.Checkpoint(Path({str(checkpoints['mixtral'])!r})).read\n"
        "tensors = ((n, t) for p in pieces for n, t in zip(p.names, p.split(read(p))))\n"
        "huggingface.write(folder, source, tensors, shard_bytes=30_000)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "shards")
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name


def damaged(folder, tmp_path, damage):
    """Copy a model's folder and let ``damage`` change it."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy)
    return copy


def _cut_off(folder):
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _remove_shard(folder):
    max(folder.glob("*.safetensors")).unlink()


def _set(**settings):
    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return damage


DAMAGES = {
    "a shard cut off": (_cut_off, ["safetensors is damaged or cut off"]),
    "a shard missing": (_remove_shard, ["safetensors is missing", "index.json names it"]),
    "another width": (_set(intermediate_size=64), ["has shape", "config.json means"]),
    "more layers": (_set(num_hidden_layers=3), ["has no tensor model.layers.2."]),
    "fewer layers": (_set(num_hidden_layers=1), ["tensors have no place", "model.layers.1."]),
    "another family": (_set(model_type="gpt2"), ["model_type 'gpt2' is not converted", "llama"]),
    "another activation": (_set(hidden_act="gelu"), ["hidden_act = 'gelu' is not converted"]),
    "no size": (_set(hidden_size=None), ["config.json: no hidden_size"]),
    "another scaling": (
        _set(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        ["RoPE scaling 'yarn' is not converted"],
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "a broken configuration": (
        lambda f: (f / "config.json").write_text("{\n oops"),
        ["config.json:2: "],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_cannot_be_converted_is_named_and_nothing_is_left(tmp_path, models, name):
    damage, messages = DAMAGES[name]
    source = damaged(models["llama"][0], tmp_path, damage)
    run = convert("hf-to-megatron", "--hf", source, "--output", tmp_path / "out")
    assert run.exit_code == 2
    for message in messages:
        assert message in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_a_damaged_checkpoint_leaves_nothing(tmp_path, models, checkpoints):
    source = models["llama"][0]

    copy = tmp_path / "damaged"
    (copy / "release").mkdir(parents=True)
    (copy / "latest_checkpointed_iteration.txt").write_text("release")
    for file in (checkpoints["llama"] / "release").iterdir():
        length = 5000 if file.suffix == ".distcp" else None
        (copy / "release" / file.name).write_bytes(file.read_bytes()[:length])
    flags = ("--megatron", copy, "--hf-config", source, "--output", tmp_path / "out")
    run = convert("megatron-to-hf", *flags)
    assert run.exit_code == 2
    assert "cannot read" in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path, models, checkpoints, monkeypatch):
    def end(folder, *args, **kwargs):
        folder.mkdir()
        (folder / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("seq1f1b_tools.checkpoint.huggingface.write", end)
    flags = ("--megatron", checkpoints["llama"], "--hf-config", models["llama"][0])
    run = convert("megatron-to-hf", *flags, "--output", tmp_path / "out")
    assert run.exit_code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model(tmp_path, models, checkpoints):
    flags = ("--megatron", checkpoints["qwen3"], "--hf-config", models["llama"][0])
    run = convert("megatron-to-hf", *flags, "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert "config.json means" in run.stderr


def test_as_a_script():
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "checkpoint" / "convert.py", "hf-to-megatron", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0
    assert "--transformer-impl" in run.stdout


def test_an_output_that_exists(tmp_path, models):
    run = convert("hf-to-megatron", "--hf", models["llama"][0], "--output", tmp_path)
    assert run.exit_code == 2
    assert f"{tmp_path} exists" in run.stderr.replace("\n", "")


def test_memory_is_that_of_single_tensors(tmp_path):
    """More than 200 MiB of weights go there and back in 80 MiB of memory."""
    script = f"""
import json, resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from seq1f1b_tools.checkpoint import huggingface, torch_dist
from seq1f1b_tools.checkpoint.torch_dist_reader import Checkpoint
from seq1f1b_tools.checkpoint.families import read_shape
from seq1f1b_tools.checkpoint.mapping import pieces

folder = Path({str(tmp_path)!r})
source = folder / "hf"
source.mkdir()
config = {json.dumps(SIZES)} | dict(
    model_type="llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=25,
    rms_norm_eps=1e-5, vocab_size=512,
)
(source / "config.json").write_text(json.dumps(config))
parts = list(pieces(read_shape(source)))
for number, piece in enumerate(parts):
    tensors = {{n: torch.randn(s) for n, s in zip(piece.names, piece.shapes)}}
    save_file(tensors, source / f"{{number}}.safetensors")
total = sum(f.stat().st_size for f in source.glob("*.safetensors"))
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (80 << 20),) * 2)
stored = huggingface.Source(source)
stored.check(parts)
make = lambda piece: piece.join([stored.read(name) for name in piece.names])
dtypes = {{piece.key: stored.dtype(piece) for piece in parts}}
torch_dist.write(folder / "megatron", parts, make, dtypes, {{}})
checkpoint = Checkpoint(folder / "megatron")
tensors = ((n, t) for p in parts for n, t in zip(p.names, p.split(checkpoint.read(p))))
huggingface.write(folder / "back", source, tensors, shard_bytes=16 << 20)
print(total >> 20)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 200
