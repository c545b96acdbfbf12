"""``seq1f1b plan-offload``, as a person types it."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.planner.command_line import read_options
from seq1f1b.schedule import num_loads

SMALL = shlex.split(
    "--num-layers 16 --hidden-size 1024 --num-attention-heads 8 --swiglu --disable-bias-linear "
    "--normalization RMSNorm --untie-embeddings-and-output-weights --position-embedding-type rope "
    "--vocab-size 8192 --hidden-dropout 0 --seq-length 1024"
)
FIXED = shlex.split("--num-virtual-stages-per-pipeline-rank 2 --micro-batch-size 2")
CARD = ["--gpus", "4", "--gpu", "l20"]


def run(*words: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan-offload", *words], env={"COLUMNS": "80"})
    assert result.exit_code == status, result.output
    return result.output


def test_it_says_what_fits_what_it_waits_for_and_what_to_paste():
    text = run(*SMALL, *CARD, *FIXED, "--global-batch-size", "16", "--host-gb", "2")
    flat = " ".join(text.split())
    for words in (
        "Offloading is not needed: 16 bytes a parameter",
        "ZeRO-Offload",
        "offload, Adam on arrival *",
        "Without clipping by the norm",
        "has not run on a GPU",
        "nothing was measured",
        "max(compute, PCIe, Adam)",
        "Loads hide from 2.9k tokens a turn on, 5.7k when all GPUs under a root load",
        "Adam hides from 3.6k tokens a step on",
        "GB are missing",
        "--offload-model-chunks",
        "--offload-prefetch",
        "--use-distributed-optimizer",
    ):
        assert words in flat, words
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_json_has_every_way_and_flags_that_parse():
    words = [*SMALL, *CARD, *FIXED, "--tokens", "16384", "--json", "--offload-model-chunks", "1"]
    found = json.loads(run(*words, "--adam", "just-in-time"))
    assert found["tokens"] == 16384
    assert found["measured"] is False
    ways = {way["name"]: way for way in found["ways"]}
    assert len(ways) == 5
    without_clipping = {name for name, way in ways.items() if not way["clips"]}
    assert without_clipping == {"offload, Adam on arrival"}
    chosen = ways["offload, just-in-time Adam"]
    assert (chosen["chunks"], chosen["chunks_on_the_gpu"], chosen["micro_batches"]) == (2, 1, 8)
    assert chosen["loads"] == [num_loads(2, 1, 1)] * 4
    spent = sum(
        chosen[f"{name}_seconds"] for name in ("compute", "bubble", "adam", "pcie", "collectives")
    )
    assert spent == pytest.approx(chosen["step_seconds"])
    assert chosen["bound_seconds"] <= chosen["step_seconds"]
    assert found["bubble"] == pytest.approx(3 / (2 * 8 * chosen["splits"]))
    assert "--offload-just-in-time-updates" in found["flags"]
    assert "--clip-grad" not in found["flags"]
    values = read_options(found["flags"]).values
    assert values["pipeline_model_parallel_size"] == 4
    assert values["micro_batch_size"] == 2
    assert values["global_batch_size"] == 16
    assert values["grad_reduce_in_bf16"]
    assert values["recompute_granularity"] == "full"


@pytest.mark.parametrize(
    "adam, flags",
    [
        ("serial", ""),
        (
            "on-arrival",
            "--offload-just-in-time-updates --clip-grad 0 --rerun-mode disabled",
        ),
    ],
)
def test_the_flags_are_those_of_the_adam_that_is_asked_for(adam, flags):
    words = [*SMALL, *CARD, *FIXED, "--tokens", "16384", "--json", "--adam", adam]
    found = " ".join(json.loads(run(*words))["flags"])
    assert found.partition("--offload-model-chunks 2 ")[2] == f"{flags} --offload-prefetch".strip()


def test_assumptions_change_the_figures():
    words = [*SMALL, *CARD, *FIXED, "--global-batch-size", "16", "--json", "--turns", "1"]
    words += ["--seq1f1b-splits", "1", "--offload-model-chunks", "2"]
    plain = _by_name(run(*words))
    serial, zero = "offload, serial Adam", "ZeRO-Offload"
    slow = _by_name(run(*words, "--host-memory-gb-s", "30", "--collectives-gb-s", "1"))
    assert slow[serial]["adam_seconds"] == pytest.approx(10 * plain[serial]["adam_seconds"])
    assert slow[zero]["collectives_seconds"] > 5 * plain[zero]["collectives_seconds"]
    half = _by_name(run(*words, "--peak-fraction", "0.3", "--recompute", "none"))
    assert half[serial]["compute_seconds"] > 1.4 * plain[serial]["compute_seconds"]
    wide = _by_name(run(*words, "--fp32-gradients"))
    assert wide[serial]["host_bytes"] == pytest.approx(plain[serial]["host_bytes"] * 22 / 20)
    assert wide[serial]["gpu_bytes"] > plain[serial]["gpu_bytes"]
    late = _by_name(run(*words, "--pcie-gb-s", "1", "--gpus-per-root", "4"))
    assert late[serial]["pcie_seconds"] > plain[serial]["pcie_seconds"]


def _by_name(text: str) -> dict:
    return {way["name"]: way for way in json.loads(text)["ways"]}


def test_a_hugging_face_configuration_is_read(tmp_path):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1024,
        "vocab_size": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--model", str(tmp_path), *CARD, "--seq-length", "1024", "--global-batch-size", "8"]
    found = json.loads(run(*words, *FIXED, "--json"))
    layer = 512 * 512 * 2 + 2 * 512 * 256 + 3 * 512 * 1024 + 2 * 512
    assert found["parameters"] == 8 * layer + 2 * 4096 * 512 + 512


def test_a_loss_is_recomputed_where_nothing_fits_otherwise():
    words = shlex.split("--model llama-3-8b --gpus 4 --gpu rtx-4090 --seq-length 65536")
    fixed = shlex.split("--global-batch-size 1 --num-virtual-stages-per-pipeline-rank 8")
    found = json.loads(run(*words, *fixed, "--json"))
    assert "--seq1f1b-recompute-loss" in found["flags"]
    ways = [way for way in found["ways"] if way["name"].startswith("offload")]
    assert ways
    assert all(way["fits"] and way["gpu_bytes"] < 24e9 for way in ways)
    text = " ".join(run(*words, *fixed).split())
    assert "(--seq1f1b-recompute-loss), without which no shape fits" in text


def test_nothing_fits_ends_with_status_1():
    words = shlex.split("--model llama-2-70b --gpus 4 --gpu rtx-4090 --seq-length 128")
    fixed = shlex.split("--global-batch-size 8 --num-virtual-stages-per-pipeline-rank 2")
    text = run(*words, *fixed, status=1)
    assert "No shape whose chunks visit the GPUs fits" in " ".join(text.split())
    assert "Offloading is needed" in text
    assert "--offload-prefetch" not in text


BATCH = ["--global-batch-size", "16"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "1", "--gpu", "l20", *BATCH], "at least 2 stages"),
        ([*CARD], "--global-batch-size: needed"),
        ([*CARD, "--tokens", "1000"], "not a multiple of --seq-length 1024"),
        ([*CARD, *BATCH, "--tokens", "1024"], "instead of --global-batch-size"),
        ([*CARD, *BATCH, "--peak-fraction", "1.5"], "above 0 and at most 1"),
        ([*CARD, *BATCH, "--pcie-gb-s", "nan"], "no number from"),
        ([*CARD, *BATCH, "--host-gb", "-3"], "no number from"),
        ([*CARD, *BATCH, "--tensor-model-parallel-size", "2"], "one GPU is one pipeline stage"),
        ([*CARD, *BATCH, "--pipeline-model-parallel-size", "2"], "goes over all 4 GPUs"),
        ([*CARD, *BATCH, "--seq1f1b-schedule", "zb-h1"], "under 1F1B only"),
        ([*CARD, *BATCH, "--optimizer", "sgd"], "Adam is modelled"),
        ([*CARD, *BATCH, "--micro-batch-size", "3"], "not a multiple of --micro-batch-size 3"),
        ([*CARD, *BATCH, *FIXED, "--offload-model-chunks", "3"], "a stage has 2 model chunks"),
        ([*CARD, *BATCH, "--num-virtual-stages-per-pipeline-rank", "1"], "must be at least 2"),
        ([*CARD, *BATCH, "--num-virtual-stages-per-pipeline-rank", "9"], "no shape of 16 layers"),
        ([*CARD, *BATCH, *FIXED, "--turns", "16"], "no shape of 16 layers"),
        ([*CARD, *BATCH, "--pipeline-model-parallel-layout", "Et*8|t*8L"], "2 parts are not 2"),
        (
            [*CARD, *BATCH, "--pipeline-model-parallel-layout", "Et*2|(t*2|)*6t*1L"],
            "the model has 16 layers",
        ),
        ([*CARD, *BATCH, "--optimizer-cpu-offload"], "--optimizer-cpu-offload"),
        (["--gpus", "4", "--gpu", "none", *BATCH], "none: there is no such description"),
        ([*CARD, *BATCH, "--recompute", "half"], "'half' is not one of"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message):
    text = run(*SMALL, *words, status=2)
    assert message in " ".join(text.replace("│", " ").split())
