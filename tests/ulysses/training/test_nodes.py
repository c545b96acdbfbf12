"""Nodes that were started differently, or see other files, are refused before the first step."""

import contextlib
import errno
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from seq1f1b.agreement import RanksDifferError
from seq1f1b.ulysses.training import checkpoints
from seq1f1b.ulysses.training.checkpoints import SavingError
from seq1f1b.ulysses.training.data import DataError
from seq1f1b.ulysses.training.engine import FsdpEngine
from seq1f1b.ulysses.training.recipe import RecipeError
from seq1f1b.ulysses.training.trainer import train
from tests.forks import python
from tests.ulysses.training.recipes import content, recipe, write_texts

pytestmark = pytest.mark.distributed


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def run(settings_by_rank, folders, resume=None):
    """Train on each rank with what it is given, as on nodes of their own; return the error."""
    rank = dist.get_rank()
    checkpoints._SECONDS_TO_SEE = 0.2
    try:
        with mock.patch.dict("os.environ", LOCAL_RANK="0"):
            train(settings_by_rank[rank], folders[rank], resume)
    except (RecipeError, DataError, RanksDifferError) as error:
        return str(error)
    return ""


def test_recipes_that_differ_are_named(workers, texts, tmp_path):
    settings = [recipe(texts, **{"training.learning_rate": rate}) for rate in (1e-2, 2e-2)]
    for said in workers(2).run(run, settings, [tmp_path / "run"] * 2):
        assert "training.learning_rate is 0.01 on rank 0, 0.02 on rank 1" in said
    assert not (tmp_path / "run").exists()


def test_data_that_differ_are_named(workers, texts, tmp_path):
    """Each node encodes its own file under one name."""
    for name, text in (("0", "some text"), ("1", "some more text")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "texts.jsonl").write_text(f'{{"text": "{text}"}}\n' * 9)
    for said in workers(2).run(run_beside_data, recipe("texts.jsonl"), tmp_path):
        assert "the encoded data is" in said


def run_beside_data(settings, tmp_path):
    """Train in a folder of each rank's own, as on a node of its own."""
    folder = tmp_path / str(dist.get_rank())
    with contextlib.chdir(folder):
        return run([settings] * 2, [folder / "run"] * 2)


def test_a_file_that_one_node_lacks_ends_all(workers, texts, tmp_path):
    for name in "01":
        (tmp_path / name).mkdir()
    (tmp_path / "0" / "texts.jsonl").write_text(texts.read_text())
    for said in workers(2).run(run_beside_data, recipe("texts.jsonl"), tmp_path):
        assert said == "rank 1: data.source: no file texts.jsonl"


def test_folders_that_are_not_shared_are_refused(workers, texts, tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    for said in workers(2).run(run, [recipe(texts)] * 2, folders):
        assert said.startswith(f"rank 1: --work-dir: {folders[1]} is not the folder of rank 0")
    assert not [*folders[0].glob(".seen*"), *folders[0].glob("checkpoints")]


def test_a_checkpoint_that_one_node_lacks_is_refused(workers, texts, tmp_path):
    settings = [recipe(texts, **{"training.steps": 1})] * 2
    shared, other = tmp_path / "run", tmp_path / "other"
    assert workers(2).run(run, settings, [shared] * 2) == ["", ""]
    for said in workers(2).run(run, settings, [shared, other], str(shared / "gone")):
        assert said == f"--resume: {shared / 'gone'} is no complete checkpoint"
    for said in workers(2).run(run, settings, [other, shared], "auto"):
        assert said.startswith(f"rank 1: --work-dir: {shared} is not the folder of rank 0")


DAMAGE = {
    "progress cut off": ("progress.json", '{"step": 1, "num_tok', "progress.json is damaged"),
    "progress without facts": ("progress.json", '{"step": 1}', "progress.json is damaged"),
    "progress of words": (
        "progress.json",
        json.dumps({"step": "one", "facts": {}, "ranks": 2}),
        "progress.json is damaged",
    ),
    "weights cut off": ("__0_0.distcp", "", "cannot be loaded"),
    "description cut off": (".metadata", "", "cannot be loaded"),
    "random numbers cut off": ("random-0.pt", "", "cannot be loaded"),
    "of DeepSpeed": (".metadata", None, "holds no checkpoint of FSDP2"),
}


def test_a_damaged_checkpoint_is_named(workers, texts, tmp_path):
    settings = [recipe(texts, **{"training.steps": 1})] * 2
    folder = tmp_path / "run"
    assert workers(2).run(run, settings, [folder] * 2) == ["", ""]
    path = folder / "checkpoints" / "step-1"
    for name, (file, text, message) in DAMAGE.items():
        whole = (path / file).read_bytes()
        if text is None:
            (path / file).unlink()
        else:
            (path / file).write_text(text)
        said = workers(2).run(run, settings, [folder] * 2, "auto")
        assert message in said[0], name
        assert f"--resume: {path}" in said[0], name
        (path / file).write_bytes(whole)


def test_random_numbers_of_a_checkpoint_run_no_code(workers, texts, tmp_path):
    settings = [recipe(texts, **{"training.steps": 1})] * 2
    folder = tmp_path / "run"
    assert workers(2).run(run, settings, [folder] * 2) == ["", ""]
    path = folder / "checkpoints" / "step-1"
    torch.save({"python": Touches(tmp_path / "touched")}, path / "random-0.pt")
    assert "cannot be loaded" in workers(2).run(run, settings, [folder] * 2, "auto")[0]
    assert not (tmp_path / "touched").exists()


class Touches:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_disk_that_is_too_small_is_named_before_the_first_step(workers, texts, tmp_path):
    settings = recipe(texts, **{"checkpoints.every": 1, "checkpoints.keep": 3})
    for said in workers(2).run(run_on_small_disk, settings, tmp_path):
        assert "left for 4 checkpoint(s) of about" in said
        assert "make room, lower checkpoints.keep, or name another folder" in said
    assert not (tmp_path / "checkpoints").exists()


def run_on_small_disk(settings, folder):
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1 << 10)):
        return run([settings] * 2, [folder] * 2)


def test_steps_that_come_again_are_logged_once(workers, texts, tmp_path):
    settings = [recipe(texts, **{"training.steps": 4})] * 2
    assert workers(2).run(run, settings, [tmp_path] * 2) == ["", ""]
    last = tmp_path / "checkpoints" / "step-4"
    last.rename(last.with_name("gone"))  # as if it had been killed before that one
    assert workers(2).run(run, settings, [tmp_path] * 2, "auto") == ["", ""]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert len((tmp_path / "metrics.jsonl.replaced").read_text().splitlines()) == 1


def test_a_full_disk_is_named_with_the_checkpoints_that_are_whole(workers, texts, tmp_path):
    settings = recipe(texts, **{"checkpoints.every": 1})
    for said in workers(2).run(run_until_full, settings, tmp_path):
        assert "step-2 was not saved, because the disk is full; " in said
        assert said.endswith("complete checkpoints beside it: step-1")


def run_until_full(settings, folder):
    save = FsdpEngine.save

    def on_full_disk(engine, folder):
        if folder.name.startswith("step-2"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(engine, folder)

    with mock.patch.object(FsdpEngine, "save", on_full_disk), pytest.raises(SavingError) as found:
        train(settings, folder)
    return str(found.value)


ALONE = """
import os
from seq1f1b import agreement
from seq1f1b.cli import app
agreement.wait_for_first.__defaults__ = (0.1,)
if os.environ["RANK"] == "1":
    os.chdir("/")
app()
"""


def test_a_rank_that_alone_refuses_says_why(texts, tmp_path):
    """One machine of two lacks the model's folder."""
    model = content(texts)["model"]["config"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(model))
    changes = {"model.config": None, "model.name": "./model"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content(texts, **changes)))
    made = python(
        *("-c", ALONE, "train", tmp_path / "recipe.yaml", "--launcher", "pytorch"),
        *("--work-dir", tmp_path / "run"),
        num_ranks=2,
        cwd=tmp_path,
        with_megatron=False,
    )
    assert made.returncode == 2
    assert "rank 1: error: model.name: no model ./model" in made.stderr
