"""Converted checkpoints compute what Hugging Face's models compute, and come back as they were."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from seq1f1b_tools.checkpoint.convert import app
from tests.distributed.training_runs import torchrun

ROOT = Path(__file__).parents[2]
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": _LLAMA3, "head_dim": 12}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def convert(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def converted(*arguments):
    run = convert(*arguments)
    assert run.exit_code == 0, run.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small random model of each family, as Hugging Face saves it."""
    import transformers

    folder = tmp_path_factory.mktemp("hf")
    made = {}
    for number, (name, (kind, extra)) in enumerate(FAMILIES.items()):
        torch.manual_seed(number)
        config = getattr(transformers, f"{kind}Config")(**_SIZES | extra)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        model.save_pretrained(folder / str(number), max_shard_size="40KB")
        made[name] = folder / str(number), model
    return made


@pytest.fixture(scope="module")
def checkpoints(models, tmp_path_factory):
    """What the models were converted to."""
    folder = tmp_path_factory.mktemp("megatron")
    made = {}
    for number, (name, (source, _)) in enumerate(models.items()):
        made[name] = folder / str(number)
        run = converted("hf-to-megatron", "--hf", source, "--output", made[name])
        assert run.stdout == (made[name] / "megatron_flags.txt").read_text()
    return made


def megatron_logits(jobs, tokens, num_stages, num_tensor):
    """Return the logits of each (checkpoint, flags) on the last stage; None on the others."""
    import os

    from megatron.adaptor import install

    install()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import (
        core_transformer_config_from_args,
        parse_args,
        validate_args,
    )

    from pretrain_gpt import model_config
    from tests.distributed.layouts import Layout

    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(torch.distributed.get_world_size())}
    Layout(stages=num_stages, tensor=num_tensor).enter()
    results = []
    for folder, flags in jobs:
        sys.argv = ["script", *flags, "--seq-length", "16", "--micro-batch-size", "1"]
        sys.argv += [
            "--tensor-model-parallel-size",
            str(num_tensor),
            "--no-gradient-accumulation-fusion",
        ]
        sys.argv += ["--pipeline-model-parallel-size", str(num_stages), "--train-iters", "1"]
        sys.argv += ["--use-cpu-initialization"]
        args = parse_args()
        validate_args(args)
        config = model_config(args)
        model = GPTModel(
            core_transformer_config_from_args(args),
            get_gpt_layer_local_spec(
                num_experts=args.num_experts,
                qk_layernorm=args.qk_layernorm,
                normalization=args.normalization,
            ),
            vocab_size=72,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            parallel_output=False,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
        ).eval()
        state = dist_checkpointing.load(model.sharded_state_dict(), str(folder / "release"))
        model.load_state_dict(state, strict=False)
        results.append(_forward(model, tokens, args.hidden_size))
    return results


def _forward(model, tokens, hidden_size):
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    if not model.pre_process:
        received = torch.empty(tokens.shape[1], tokens.shape[0], hidden_size)
        torch.distributed.recv(received, ranks[group.rank() - 1], group=group)
        model.set_input_tensor(received)
    with torch.no_grad():
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = model(tokens, positions, None)
    if model.post_process:
        return output
    torch.distributed.send(output.contiguous(), ranks[group.rank() + 1], group=group)
    return None


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_logits_are_those_of_hugging_face(workers, models, checkpoints):
    tokens = torch.randint(0, 70, (2, 16), generator=torch.Generator().manual_seed(5))
    jobs = [
        (folder, shlex.split((folder / "megatron_flags.txt").read_text()))
        for folder in checkpoints.values()
    ]
    answers = [
        answer
        for answer in workers(4).run(megatron_logits, jobs, tokens, 2, 2)
        if answer[0] is not None
    ]
    assert len(answers) == 2
    for answer in answers:
        for (name, (_, model)), logits in zip(models.items(), answer, strict=True):
            with torch.no_grad():
                expected = model(tokens).logits
            error = (logits[..., :70] - expected).abs().max() / expected.abs().max()
            assert error < 1e-5, name


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_converted_model_goes_on_training(tmp_path, models, checkpoints):
    flags = (checkpoints["qwen3"] / "megatron_flags.txt").read_text()
    arguments = shlex.split(
        f"--load {checkpoints['qwen3']} --finetune {flags} --save {tmp_path / 'saved'} "
        "--save-interval 2 "
        "--ckpt-format torch_dist --pipeline-model-parallel-size 2 --seq1f1b-splits 2 "
        "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-4 "
        "--mock-data --tokenizer-type NullTokenizer --eval-iters 1 --eval-interval 2 "
        f"--seq1f1b-metrics-file {tmp_path / 'metrics.jsonl'}"
    )
    run = torchrun(2, ROOT / "pretrain_gpt.py", *arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "successfully loaded checkpoint" in run.stdout
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    flags = ("--hf-config", models["qwen3"][0], "--output", tmp_path / "trained")
    back = converted("megatron-to-hf", "--megatron", tmp_path / "saved", *flags)
    assert "58 rows beyond the vocabulary" in back.stderr
    before, after = tensors_of(models["qwen3"][0]), tensors_of(tmp_path / "trained")
    for name, tensor in before.items():
        assert 0 < (after[name] - tensor).abs().max() < 1e-3, name


def tensors_of(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors


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
        "from seq1f1b_tools.checkpoint import huggingface, torch_dist, mapping\n"
        "from seq1f1b_tools.checkpoint.families import read_shape\n"
        f"source, folder = Path({str(source)!r}), Path({str(tmp_path / 'shards')!r})\n"
        "pieces = mapping.pieces(read_shape(source))\n"
        f"read = torch_dist.Checkpoint(Path({str(checkpoints['mixtral'])!r})).read\n"
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
    "biases": (_set(attention_bias=True), ["attention_bias = True is not converted"]),
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
from seq1f1b_tools.checkpoint.families import read_shape
from seq1f1b_tools.checkpoint.mapping import pieces

folder = Path({str(tmp_path)!r})
source = folder / "hf"
source.mkdir()
config = {json.dumps(_SIZES)} | dict(
    model_type="llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=25,
    rms_norm_eps=1e-5, vocab_size=512,
)
(source / "config.json").write_text(json.dumps(config))
parts = pieces(read_shape(source))
for number, piece in enumerate(parts):
    tensors = {{n: torch.randn(s) for n, s in zip(piece.names, piece.shapes)}}
    save_file(tensors, source / f"{{number}}.safetensors")
total = sum(f.stat().st_size for f in source.glob("*.safetensors"))
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (80 << 20),) * 2)
stored = huggingface.Source(source)
stored.check(parts, is_tied=False)
make = lambda piece: piece.join([stored.read(name) for name in piece.names])
torch_dist.write(folder / "megatron", parts, make, torch.float32, {{}})
checkpoint = torch_dist.Checkpoint(folder / "megatron")
tensors = ((n, t) for p in parts for n, t in zip(p.names, p.split(checkpoint.read(p))))
huggingface.write(folder / "back", source, tensors, shard_bytes=16 << 20)
print(total >> 20)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 200
