"""Recipes: typed keys, unknown ones refused, every one documented."""

import math
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.ulysses.training.catalogue import recipe_names, recipe_path
from seq1f1b.ulysses.training.recipe import (
    RecipeError,
    check_recipe,
    documented_keys,
    read_recipe,
)
from tests.ulysses.training.recipes import content

SOURCE = Path("texts.jsonl")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sequence_paralel_size": 2}, "no such key; did you mean sequence_parallel_size?"),
        ({"training.betas": [1.5, 0.9]}, "training.betas.0: Input should be less than 1, not 1.5"),
        ({"training.learning_rate": math.inf}, "learning_rate: Input should be a finite number"),
        ({"training.min_learning_rate": 1.0}, "min_learning_rate 1 is above learning_rate 0.01"),
        ({"data.max_length": 1}, "data.max_length: Input should be greater than or equal to 2"),
        ({"training.learning_rat": 1.0}, "training.learning_rat: no such key; did you mean"),
        ({"training.zebra": 1.0}, "training.zebra: no such key; known here: steps, epochs"),
        ({"training.steps": "many"}, "training.steps: Input should be a valid integer"),
        ({"training.epochs": 2}, "training: give either steps or epochs"),
        ({"training.steps": 0}, "training.steps: Input should be greater than 0, not 0"),
        ({"model.name": "folder"}, "model: give either name .* or config"),
        ({"model.config": {"hidden_size": 3}}, "model: config needs model_type"),
        ({"model.dtype": "float64"}, "model.dtype: Input should be 'float32' or 'bfloat16'"),
        ({"memory.recompute": "some"}, "memory.recompute: Input should be 'none', 'layers'"),
        ({"data": {"max_length": 3}}, "data.source: missing, and there is no default"),
    ],
)
def test_a_wrong_key_is_named(changes, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        check_recipe(content(SOURCE, **changes), "test")


def test_all_faults_are_listed_at_once():
    with pytest.raises(RecipeError) as error:
        check_recipe(content(SOURCE, zebra=1, **{"training.steps": -1}), "my.yaml")
    assert len(str(error.value).splitlines()) == 2
    assert all(line.startswith("my.yaml: ") for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    "text, message", [("a: [", "no YAML"), ("- a", "a mapping of keys, not list")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "nothing.yaml")


def test_every_key_is_documented():
    rows = documented_keys()
    assert len(rows) > 40
    assert all(text for _, _, text in rows)
    assert ("sequence_parallel_size", "1", "Ranks that share a row.") in rows
    assert ("data.max_length", "required", "Tokens of a row.") in rows


def test_the_command_prints_every_key():
    printed = CliRunner().invoke(app, ["list-cfg", "--keys"]).output
    lines = printed.splitlines()
    for key, default, meaning in documented_keys():
        assert any(line.split()[:2] == [key, default.split()[0]] for line in lines), key
        assert meaning.split()[0] in printed
    only = CliRunner().invoke(app, ["list-cfg", "--keys", "-p", "TILE"]).output
    assert [line.split()[0] for line in only.splitlines() if "memory." in line] == [
        "memory.loss_tile",
        "memory.mlp_tile",
    ]
    assert CliRunner().invoke(app, ["list-cfg", "--keys", "-p", "zebra"]).exit_code == 1


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_come_with_the_package_are_sound(name):
    recipe = read_recipe(recipe_path(name))
    assert recipe.data.max_length % recipe.sequence_parallel_size == 0
    again = check_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))), name)
    assert again == recipe


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_list_and_copy(tmp_path):
    assert "llama_tiny_seq8k" in run("list-cfg").split()
    assert run("list-cfg", "-p", "TINY").split() == ["llama_tiny_seq8k"]
    assert CliRunner().invoke(app, ["list-cfg", "-p", "zebra"]).exit_code == 1
    copied = Path(run("copy-cfg", "llama_tiny_seq8k", str(tmp_path)).strip())
    assert copied == tmp_path / "llama_tiny_seq8k_copy.yaml"
    assert copied.read_text() == recipe_path("llama_tiny_seq8k").read_text()
    again = CliRunner().invoke(app, ["copy-cfg", "llama_tiny_seq8k", str(tmp_path)])
    assert again.exit_code == 2


@pytest.mark.parametrize("command", ["train", "copy-cfg"])
def test_an_unknown_recipe_is_named(command, tmp_path):
    more = [str(tmp_path)] if command == "copy-cfg" else []
    result = CliRunner().invoke(app, [command, "llama_big", *more], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "no recipe llama_big; similar: " in result.output
