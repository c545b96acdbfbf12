"""Models of every family and what they are converted to, made once."""

import pytest

from tests.seq1f1b_tools.checkpoint.tiny_models import FAMILIES, converted, make


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A small random model of each family, as Hugging Face saves it."""
    folder = tmp_path_factory.mktemp("hf")
    return {
        name: (folder / str(number), make(name, folder / str(number)))
        for number, name in enumerate(FAMILIES)
    }


@pytest.fixture(scope="session")
def checkpoints(models, tmp_path_factory):
    """What the models were converted to."""
    folder = tmp_path_factory.mktemp("megatron")
    made = {}
    for number, (name, (source, _)) in enumerate(models.items()):
        made[name] = folder / str(number)
        run = converted("hf-to-megatron", "--hf", source, "--output", made[name])
        assert run.stdout == (made[name] / "megatron_flags.txt").read_text()
    return made
