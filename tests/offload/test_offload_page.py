"""docs/offload.md has what its script prints, and says which bars are reached."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from seq1f1b.offload.planning.case import Recomputation
from seq1f1b.offload.planning.machine import Machine
from seq1f1b.planner.gpu import gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offload_page", ROOT / "docs" / "offload.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables(script):
    machines = {card: Machine.of(gpu(card), 4) for card in script.CARDS}
    return script.Tables(script.Assumed(machines, Recomputation.FULL, False))


@pytest.mark.parametrize("name", ["short_table", "thresholds"])
def test_the_page_has_the_table(script, tables, name):
    words = [["llama-2-7b"], []][name == "thresholds"]
    assert "\n".join(getattr(tables, name)(*words)) in script.PAGE.read_text()


@pytest.mark.long
def test_the_page_has_all_that_the_script_prints(script, tables):
    page = script.PAGE.read_text()
    assert script.placed(page, tables.page()) == page


@pytest.mark.long
def test_bars_that_are_missed_are_those_that_the_page_names(script, tables):
    bars = tables.bars()
    missed = [name for name, (_, reached) in bars.items() if not reached]
    assert len(bars) == 10
    assert missed == ["Llama 3 8B, 64k x 1 on 4 x RTX 4090, v=8, k=2, s=16: under 24 GB"]
    assert script.PAGE.read_text().count("**no**") == len(missed)


def test_bars_of_short_steps(tables):
    for card in ("l20", "rtx-4090"):
        ways = tables.short("llama-2-7b", card)
        zero, gpipe = ways["ZeRO-Offload"], ways["GPipe, all on the GPUs"]
        plain = ways["v=2, k=2, serial Adam"]
        assert 1.15 <= zero.seconds / plain.seconds <= 1.30
        assert zero.seconds / ways["v=8, k=2, just-in-time Adam"].seconds >= 1.5
        assert gpipe.gpu_bytes / plain.gpu_bytes >= 3


def test_other_assumptions_give_other_tables(script, tables):
    slow = tables.assumed.changed(host=87e9)
    assert "\n".join(script.Tables(slow).thresholds()) != "\n".join(tables.thresholds())
    with pytest.raises(ValueError, match="marks"):
        script.placed("a page without them", "tables")
