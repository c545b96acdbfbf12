"""The check finds faults that are planted, and passes what is right."""

import json
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from seq1f1b.cli import app
from seq1f1b.ulysses import (
    UnsupportedModelError,
    dispatch_modules,
    init_sequence_parallel,
    interface,
    rows,
)
from seq1f1b.ulysses.check import Comparison, Source
from seq1f1b.ulysses.check.run import check_rank
from seq1f1b.ulysses.mends import convolution
from seq1f1b.ulysses.rows import Pattern, Rows
from seq1f1b.ulysses.run import Run
from tests.forks import python
from tests.ulysses.families import FAMILIES

CONFIGS = (
    "llama",
    "mistral",
    "qwen2_moe",
    "gemma3_text",
    "olmo3",
    "gpt_oss",
    "deepseek_v3",
    "olmo_hybrid",
    "qwen3_next",
    "cohere2",
)
WINDOWED = {"mistral", "gemma3_text", "olmo3", "gpt_oss", "cohere2"}
CONVOLVED = {"olmo_hybrid", "qwen3_next"}


def no_window(self: Rows, pattern: Pattern) -> Pattern:
    return Pattern(None, pattern.chunk)


def one_document(positions: Tensor, is_real: Tensor | None) -> Tensor:
    begins = torch.zeros(positions.shape, dtype=torch.bool)
    begins[:, 0] = True
    return begins


def no_halo(run: Run, x: Tensor, width: int) -> Tensor:
    return torch.zeros_like(x[:, :, : min(width, run.own.start)])


FAULTS: dict[str, Any] = {
    "none": lambda: mock.patch.object(interface, "NAME", interface.NAME),
    "window dropped": lambda: mock.patch.object(Rows, "simplify", no_window),
    "documents mixed": lambda: mock.patch.object(rows, "_begins_of_positions", one_document),
    "halo lost": lambda: mock.patch.object(convolution, "halo", no_halo),
}


def check_with(fault: str, name: str, layouts: tuple[str, ...]) -> list[Comparison]:
    with FAULTS[fault]():
        return check_rank(Source(name), 2, layouts, 1, 48)


def is_found(workers: Any, fault: str, name: str) -> bool:
    layout = "packed" if fault == "documents mixed" else "plain"
    (result,) = workers(2).run(check_with, fault, name, (layout,))[0]
    return not result.is_exact


@pytest.mark.distributed
@pytest.mark.parametrize("name", CONFIGS)
def test_faults_are_found_and_nothing_else(workers, name):
    assert not is_found(workers, "none", name)
    assert is_found(workers, "documents mixed", name)
    assert is_found(workers, "window dropped", name) == (name in WINDOWED)
    assert is_found(workers, "halo lost", name) == (name in CONVOLVED)


def verified(fault: str, name: str) -> str:
    init_sequence_parallel(2)
    with FAULTS[fault]():
        try:
            dispatch_modules(FAMILIES[name].build(), verify=True)
        except UnsupportedModelError as error:
            return str(error)
    return ""


@pytest.mark.distributed
def test_dispatch_verifies_if_asked(workers):
    assert workers(2).run(verified, "none", "mistral") == ["", ""]
    for said in workers(2).run(verified, "window dropped", "mistral"):
        assert said.startswith(
            "MistralForCausalLM is not exact on 2 ranks: plain rows: loss differs"
        )


@pytest.mark.distributed
def test_the_command_prints_every_gradient(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("qwen2").save_pretrained(tmp_path)
    run = CliRunner().invoke(
        app, ["ulysses", "check", str(tmp_path), "--sp", "2", "--layouts", "packed", "--json"]
    )
    assert run.exit_code == 0, run.output
    (figures,) = json.loads(run.stdout[run.stdout.index("[") :])
    assert figures["exact"]
    assert figures["ranks"] == 2
    assert "model.layers.0.self_attn.q_proj.bias" in figures["gradient_errors"]
    assert max(figures["gradient_errors"].values()) < 1e-5


@pytest.mark.distributed
def test_the_command_says_why_a_model_is_refused():
    run = python("-m", "seq1f1b.cli", "ulysses", "check", "bloom")
    assert run.returncode == 2
    assert "refused: BloomForCausalLM cannot be dispatched: BloomAttention mixes" in run.stderr


def test_bad_arguments_are_named():
    runner = CliRunner()
    layouts = runner.invoke(app, ["ulysses", "check", "llama", "--layouts", "plane"])
    assert layouts.exit_code == 2
    assert "no layout plane" in layouts.output
