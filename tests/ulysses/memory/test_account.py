"""The account before a run: its terms, against what a step keeps, and what it advises."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.ulysses import dispatch_modules, init_sequence_parallel
from seq1f1b.ulysses.account import Load, Shape, account
from seq1f1b.ulysses.check import Source
from seq1f1b.ulysses.training.recipe import MemorySettings
from tests.ulysses.memory.test_sizes import build, saved_in, step

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture
def llama(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return str(tmp_path)


def plan(model: str, *options: str):
    return CliRunner().invoke(app, ["ulysses", "plan", model, *options])


def test_a_million_tokens_on_eight_gpus_term_by_term(llama):
    run = plan(llama, "--tokens", "1048576", "--json")
    assert run.exit_code == 0, run.output
    figures = json.loads(run.stdout)
    terms = figures["gib"]
    # 8.03e9 parameters of 16 bytes on 8 GPUs; 131,072 tokens a GPU of 4096 or 14336 bfloat16 values
    assert terms["weights, gradients and AdamW moments, divided"] == pytest.approx(14.96, abs=0.01)
    assert terms["inputs of layers"] == 32 * 1.0
    assert terms["queries, keys, values and output, gathered"] == 1 + 0.25 + 0.25 + 1
    assert terms["MLP"] == 4 * 3.5
    assert figures["peak_gib"] > figures["limit_gib"] > figures["peak_gib_changed"]
    assert figures["change"] == {"mlp_tile": 4096}


def test_it_fits_or_nothing_helps_or_the_recipe_is_printed(llama):
    fits = plan(llama, "--tokens", "65536")
    assert fits.exit_code == 0
    assert "Fits NVIDIA H100" in fits.output
    too_much = plan(llama, "--tokens", "4194304", "--gpus", "1", "--gpu", "rtx-4090")
    assert too_much.exit_code == 1
    assert "use more GPUs" in too_much.output
    changed = plan(llama, "--tokens", "1048576")
    assert "memory:\n  mlp_tile: 4096\n" in changed.output


@pytest.mark.parametrize("mlp_tile", [None, 256, 4096])
def test_what_is_kept_agrees_with_a_step(mlp_tile):
    length, layers = 2048, 4
    init_sequence_parallel(1)
    model = dispatch_modules(
        build("llama", num_hidden_layers=layers), loss_tile=64, mlp_tile=mlp_tile
    )
    step(model, 64)
    kept = saved_in(model, lambda: step(model, length))
    shape = Shape(
        parameters=0,
        layer_parameters=0,
        other_parameters=0,
        num_layers=layers,
        hidden=64,
        vocabulary=1,
        heads=4,
        key_heads=2,
        key_width=16,
        value_width=16,
        mlp=4 * 128,
    )
    load = Load(length, gpus=1, size=1, itemsize=4)
    terms = account(shape, load, MemorySettings(recompute="none", loss_tile=1, mlp_tile=mlp_tile))
    counted = sum(term.nbytes for term in terms if term.name != "gradients of these")
    assert 0.8 <= kept / counted <= 1.25


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, (1, 1)),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, (3, 2)),
    ],
)
def test_what_ranks_gather_follows_their_heads(settings, expected, tmp_path):
    config = {"model_type": "llama", "hidden_size": 48, **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = Shape.read(Source(str(tmp_path)))
    assert shape.heads == settings["num_attention_heads"]
    name = "queries, keys, values and output, gathered"
    found = []
    for size in (2, 4):
        terms = {t.name: t.nbytes for t in account(shape, Load(64, 4, size), MemorySettings())}
        width = 64 * (shape.key_width + shape.value_width) * 2
        found.append(terms[name] / width - shape.heads / size)
    # whole heads where they divide; otherwise as many as a range of work can touch
    assert tuple(found) == expected


def test_bad_arguments_are_named(llama):
    assert "6 does not divide the 8 GPUs" in plan(llama, "--tokens", "64", "--sp", "6").output
    unknown = plan(llama, "--tokens", "64", "--gpu", "h900")
    assert unknown.exit_code == 2
    assert "h900" in unknown.output
    missing = plan("no-such-folder/here", "--tokens", "64")
    assert missing.exit_code == 2
    assert "no-such-folder/here is no folder" in missing.output
