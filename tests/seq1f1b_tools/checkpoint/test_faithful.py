"""What is in a model's folder comes over as transformers reads it, or is refused by its name."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from tests.seq1f1b_tools.checkpoint.tiny_models import (
    FAMILIES,
    convert,
    converted,
    flags_of,
    tensors_of,
)


@pytest.fixture
def to_megatron(tmp_path):
    """Convert a folder and return the checkpoint."""

    def run(folder, *flags):
        converted("hf-to-megatron", "--hf", folder, "--output", tmp_path / "megatron", *flags)
        return tmp_path / "megatron"

    return run


@pytest.fixture
def refusal(tmp_path):
    """Convert a folder that cannot be converted, and return the message."""

    def run(folder, *flags):
        run = convert("hf-to-megatron", "--hf", folder, "--output", tmp_path / "none", *flags)
        assert run.exit_code == 2, run.stdout
        assert not isinstance(run.exception, Exception) or isinstance(run.exception, SystemExit)
        assert not list(tmp_path.glob("none*"))
        return run.stderr

    return run


def back(checkpoint, config, output, *flags):
    converted(
        *("megatron-to-hf", "--megatron", checkpoint, "--hf-config", config, "--output", output),
        *flags,
    )
    return tensors_of(output)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def rewrite(folder, tensors, **settings):
    """Store other tensors in one file, and other settings."""
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, **settings)


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def folder(models, tmp_path):
    """A copy of the Llama model, to be changed."""
    return shutil.copytree(models["llama"][0], tmp_path / "folder")


# ------------------------------------------------------------------------------ which files


@pytest.mark.parametrize("name", ["model-00009-of-00009", "zzz", "consolidated", "aaa"])
def test_files_that_the_index_does_not_name_are_not_read(folder, to_megatron, tmp_path, name):
    expected = tensors_of(folder)
    save_file({key: t + 1 for key, t in expected.items()}, folder / f"{name}.safetensors")
    assert_equal(back(to_megatron(folder), folder, tmp_path / "back"), expected)


def test_a_tensor_is_read_from_the_file_that_the_index_names(folder, to_megatron, tmp_path):
    """Though another file that the index names has one of that name too."""
    expected = tensors_of(folder)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    moved = {key: t + 1 for key, t in expected.items() if index[key] == first.name}
    save_file(moved | {k: t for k, t in expected.items() if index[k] == last.name}, last)
    assert_equal(back(to_megatron(folder), folder, tmp_path / "back"), expected)


@pytest.mark.parametrize("file", ["../x.safetensors", "a/b", "/etc/passwd", "..", "", "a\\b", 3])
def test_an_index_cannot_name_files_elsewhere(folder, refusal, file):
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    named["weight_map"]["lm_head.weight"] = file
    index.write_text(json.dumps(named))
    assert "lm_head.weight lies in" in refusal(folder)


def test_a_single_file_beside_an_index_is_not_chosen_from(folder, refusal):
    save_file(tensors_of(folder), folder / "model.safetensors")
    assert "model.safetensors beside model.safetensors.index.json" in refusal(folder)


def test_the_same_name_in_two_files_without_an_index(folder, refusal):
    (folder / "model.safetensors.index.json").unlink()
    save_file({"lm_head.weight": torch.zeros(70, 32)}, folder / "other.safetensors")
    assert "lm_head.weight lies in" in refusal(folder)


def test_links_of_the_hubs_cache_are_followed(models, to_megatron, tmp_path):
    source = models["llama"][0]
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_equal(back(to_megatron(snapshot), snapshot, tmp_path / "back"), tensors_of(source))


@pytest.mark.parametrize("num_files", [1, 2])
def test_pickled_weights_are_loaded_without_running_code(folder, to_megatron, tmp_path, num_files):
    expected = tensors_of(folder)
    rewrite(folder, {})
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{number}.bin" for number in range(num_files)]
    names = names if num_files > 1 else ["pytorch_model.bin"]
    weight_map = {key: names[number % num_files] for number, key in enumerate(expected)}
    for file in names:
        torch.save({k: expected[k] for k, f in weight_map.items() if f == file}, folder / file)
    if num_files > 1:
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(back(to_megatron(folder), folder, tmp_path / "back"), expected)


# ------------------------------------------------------------------------- what has no place


@pytest.mark.parametrize(
    "trained,config,settings,named",
    [
        ("qwen2", "llama, tied", {}, "decoder.layers.self_attention.linear_qkv.bias"),
        ("qwen3", "llama", {"head_dim": 16}, "decoder.layers.self_attention.k_layernorm.weight"),
        ("llama, all biases", "llama, tied", {"tie_word_embeddings": False}, "linear_fc1.bias"),
    ],
)
def test_tensors_without_a_place_in_the_config_are_named(
    models, checkpoints, tmp_path, trained, config, settings, named
):
    like = shutil.copytree(models[config][0], tmp_path / "like")
    change(like, **settings)
    run = convert(
        *("megatron-to-hf", "--megatron", checkpoints[trained], "--hf-config", like),
        *("--output", tmp_path / "out"),
    )
    assert run.exit_code == 2
    assert "no place in the model of config.json" in run.stderr
    assert named in run.stderr
    assert not (tmp_path / "out").exists()


def test_biases_that_only_megatron_has_must_be_zero(models, tmp_path):
    """Llama may have biases in attention only, where Megatron has them in both."""
    both = converted_folder(models, "llama, all biases", tmp_path / "both")
    like = shutil.copytree(models["llama, biases of attention"][0], tmp_path / "like")
    run = convert(
        *("megatron-to-hf", "--megatron", both, "--hf-config", like, "--output", tmp_path / "out")
    )
    assert run.exit_code == 2
    assert "linear_fc1.bias is not zero" in run.stderr
    assert "set mlp_bias to true" in run.stderr
    change(like, mlp_bias=True)
    expected = tensors_of(models["llama, all biases"][0])
    assert_equal(back(both, like, tmp_path / "out"), expected)


def converted_folder(models, name, output):
    converted("hf-to-megatron", "--hf", models[name][0], "--output", output)
    return output


def test_layers_for_multi_token_prediction_are_left_out_only_when_asked_to(
    models, tmp_path, refusal
):
    folder = shutil.copytree(models["deepseek_v3"][0], tmp_path / "folder")
    expected = tensors_of(folder)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(32, 64)}
    rewrite(folder, expected | extra)
    assert "leave such layers out with --drop-mtp" in refusal(folder)
    converted("hf-to-megatron", "--hf", folder, "--output", tmp_path / "m", "--drop-mtp")
    assert_equal(back(tmp_path / "m", folder, tmp_path / "back"), expected)


# --------------------------------------------------------------------------------- tied or not


def test_an_output_layer_that_differs_from_the_embedding_is_kept(models, to_megatron, tmp_path):
    """As transformers does, which then does not tie them."""
    folder = shutil.copytree(models["llama, tied"][0], tmp_path / "folder")
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    rewrite(folder, tensors)
    checkpoint = to_megatron(folder)
    assert "--untie-embeddings-and-output-weights" in flags_of(checkpoint)
    assert_equal(back(checkpoint, folder, tmp_path / "back"), tensors)
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is False


def test_an_output_layer_that_is_the_embedding_stays_tied(models, to_megatron, tmp_path):
    folder = shutil.copytree(models["llama, tied"][0], tmp_path / "folder")
    tensors = tensors_of(folder)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    rewrite(folder, tensors | head)
    checkpoint = to_megatron(folder)
    assert "--untie-embeddings-and-output-weights" not in flags_of(checkpoint)
    assert_equal(back(checkpoint, folder, tmp_path / "back"), tensors)


# ----------------------------------------------------------------------------------- precision


def mixed(folder):
    """Store weights in bfloat16, norms and routers in float32."""
    tensors = {
        name: tensor if "norm" in name or "gate.weight" in name else tensor.bfloat16()
        for name, tensor in tensors_of(folder).items()
    }
    rewrite(folder, tensors, dtype="bfloat16")
    return tensors


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_each_tensor_keeps_its_type(models, to_megatron, tmp_path, name):
    folder = shutil.copytree(models[name][0], tmp_path / "folder")
    tensors = mixed(folder)
    found = back(to_megatron(folder), folder, tmp_path / "back")
    assert_equal(found, tensors)
    assert {t.dtype for t in found.values()} == {torch.float32, torch.bfloat16}
    settings = (tmp_path / "back" / "config.json").read_text()
    assert settings == (folder / "config.json").read_text()


def test_layers_of_several_types_are_stored_in_the_one_that_holds_all(
    folder, to_megatron, tmp_path
):
    tensors = tensors_of(folder)
    odd = "model.layers.1.mlp.up_proj.weight"
    tensors = {k: t if k == odd else t.bfloat16() for k, t in tensors.items()}
    rewrite(folder, tensors)
    found = back(to_megatron(folder), folder, tmp_path / "back")
    assert torch.equal(found[odd], tensors[odd])
    for name, tensor in tensors.items():
        assert torch.equal(found[name].float(), tensor.float())
        wide = "mlp.up_proj" in name or "mlp.gate_proj" in name
        assert found[name].dtype == (torch.float32 if wide else torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_that_is_asked_for(models, to_megatron, tmp_path, dtype):
    folder = shutil.copytree(models["deepseek_v3"][0], tmp_path / "folder")
    expected = {
        name: tensor if "correction_bias" in name else tensor.to(getattr(torch, dtype))
        for name, tensor in tensors_of(folder).items()
    }
    checkpoint = to_megatron(folder, "--dtype", dtype)
    assert_equal(back(checkpoint, folder, tmp_path / "back"), expected)
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["dtype"] == dtype


@pytest.mark.parametrize("size", ["inf", "nan", "1e400"])
def test_a_shard_has_a_size(models, checkpoints, tmp_path, size):
    run = convert(
        *("megatron-to-hf", "--megatron", checkpoints["llama"]),
        *("--hf-config", models["llama"][0], "--output", tmp_path / "out"),
        *("--max-shard-gib", size),
    )
    assert run.exit_code == 2
    assert "--max-shard-gib" in run.stderr


def test_a_type_that_is_asked_for_on_the_way_back(models, checkpoints, tmp_path):
    like = shutil.copytree(models["llama"][0], tmp_path / "like")
    found = back(checkpoints["llama"], like, tmp_path / "out", "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8, torch.int64])
def test_weights_of_other_types_are_refused(folder, refusal, dtype):
    tensors = tensors_of(folder)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32).to(dtype)
    rewrite(folder, tensors)
    assert "model.layers.0.mlp.up_proj.weight has type" in refusal(folder)


@pytest.mark.parametrize(
    "settings",
    [{"quantization_config": {"quant_method": "fp8"}}, {"quantization_config": {}}],
)
def test_quantized_models_are_refused(folder, refusal, settings):
    change(folder, **settings)
    assert "the weights are quantized (quantization_config)" in refusal(folder)


# ------------------------------------------------------------------------------------ settings


WRONG_SETTINGS = {
    "text for a number": ({"rms_norm_eps": "1e-6 --load /x"}, "rms_norm_eps"),
    "text for a size": ({"hidden_size": "32"}, "hidden_size"),
    "a switch for a size": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "below zero": ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    "no heads": ({"num_attention_heads": 0}, "config.json: "),
    "beyond all sizes": ({"vocab_size": 2**70}, "vocab_size"),
    "too many digits": ({"hidden_size": 10**400}, "hidden_size"),
    "not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf"),
    "rope as text": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4 --x"}},
        "rope_theta = '1e4 --x' must be a number",
    ),
    "rope of a fraction": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}},
        "rope_theta = 10000.5 is not converted",
    ),
    "rope scaled by a fraction": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        "linear RoPE scaling by 2.5",
    ),
    "rope of a part": (
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        "partial_rotary_factor = 0.5",
    ),
    "a file elsewhere": ({"transformers_weights": "x.safetensors"}, "transformers_weights"),
    "code of its own": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}},
        "model_type 'mine' is not converted",
    ),
}


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_settings_are_typed(folder, refusal, name):
    settings, message = WRONG_SETTINGS[name]
    change(folder, **settings)
    text = refusal(folder)
    assert message in text
    assert text.count("\n") == 1


_NOT_CONFIGS = ("[]", "null", "3", "", "{", '{"model_type": 3}', "\x00")
_ENDLESS = ("[" * 100_000, '{"a":' * 50_000, "1" * 5000)


@pytest.mark.parametrize("content", [*_NOT_CONFIGS, *_ENDLESS], ids=range(10))
def test_a_config_that_is_none(folder, refusal, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_the_flags_are_one_word_a_line(checkpoints):
    """The bash of docs/checkpoints.md reads them, though one of them has brackets."""
    file = checkpoints["qwen2_moe, dense layers"] / "megatron_flags.txt"
    script = 'mapfile -t flags <"$1"; printf "<%s>" "${flags[@]}"'
    run = subprocess.run(
        ["bash", "-c", script, "bash", file], capture_output=True, text=True, check=True
    )
    words = run.stdout.removeprefix("<").removesuffix(">").split("><")
    assert words == flags_of(file.parent)
    assert "[1,0]" in words


def test_the_arguments_in_a_checkpoint_are_those_of_its_flags(checkpoints):
    """As Megatron's own parser names and types them."""
    from tests.programs import ask

    program = """
import json, sys
from megatron.adaptor import install
install()
import torch
from megatron.training.arguments import parse_args
differences = {}
for folder in json.load(sys.stdin):
    flags = open(f"{folder}/megatron_flags.txt").read().splitlines()
    sys.argv = ["script", *flags]
    parsed = vars(parse_args())
    from megatron.core.dist_checkpointing import load_common_state_dict
    stored = vars(load_common_state_dict(f"{folder}/release")["args"])
    for name, value in stored.items():
        if name not in parsed or parsed[name] != value:
            differences[f"{folder} {name}"] = [repr(value), repr(parsed.get(name, "none"))]
print("ANSWER" + json.dumps(differences))
"""
    assert ask(program, [str(folder) for folder in checkpoints.values()]) == {}


# ---------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("tensor_parallel,rows", [(1, 70), (2, 70), (4, 72), (128, 128)])
def test_the_vocabulary_is_divisible(folder, to_megatron, tmp_path, tensor_parallel, rows):
    checkpoint = to_megatron(folder, "--tensor-parallel", tensor_parallel)
    flags = flags_of(checkpoint)
    assert flags[flags.index("--padded-vocab-size") + 1] == str(rows)
    assert_equal(back(checkpoint, folder, tmp_path / "back"), tensors_of(folder))


def test_a_vocabulary_that_was_cut_is_refused_on_the_way_back(models, checkpoints, tmp_path):
    like = shutil.copytree(models["llama"][0], tmp_path / "like")
    change(like, vocab_size=72)
    run = convert(
        *("megatron-to-hf", "--megatron", checkpoints["llama"], "--hf-config", like),
        *("--output", tmp_path / "out"),
    )
    assert run.exit_code == 2
    assert "has shape [70, 32], config.json means [72, 32]" in run.stderr


# -------------------------------------------------------------------------------------- other


def test_a_name_on_the_hub_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = convert("hf-to-megatron", "--hf", "someone/some-model", "--output", tmp_path / "out")
    assert run.exit_code == 2
    assert "someone/some-model: no such folder, and it cannot be fetched" in run.stderr
    assert "HF_HUB_OFFLINE" in run.stderr
    assert run.stderr.count("\n") == 1
    run = convert("hf-to-megatron", "--hf", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert f"{tmp_path}/nowhere: no such folder" in run.stderr


def test_a_name_on_the_hub_that_is_in_the_cache(models, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--someone--some-model"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(models["llama"][0], snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    output = tmp_path / "megatron"
    converted("hf-to-megatron", "--hf", "someone/some-model", "--output", output)
    found = back(output, "someone/some-model", tmp_path / "back")
    assert_equal(found, tensors_of(models["llama"][0]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith(("mis", "mix"))])
def test_a_sliding_window_bounds_the_positions(models, to_megatron, tmp_path, name):
    folder = shutil.copytree(models[name][0], tmp_path / "folder")
    change(folder, sliding_window=48)
    flags = flags_of(to_megatron(folder))
    assert flags[flags.index("--max-position-embeddings") + 1] == "48"
