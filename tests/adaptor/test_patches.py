"""Patches replace by name, everywhere, and stop at a Megatron-Core that they do not know."""

import sys
import types

import pytest

from megatron.adaptor import patches
from megatron.adaptor.patches import Patch, UnsupportedMegatronError, apply_all


@pytest.fixture
def upstream(monkeypatch):
    """A stand-in for Megatron: two modules, of which one imported a function of the other."""
    defining = types.ModuleType("megatron.stand_in")
    importing = types.ModuleType("megatron.stand_in_user")
    exec("def cut(batch, group): return ('upstream', batch)", vars(defining))
    exec("class Layer:\n    def forward(self, x): return x + 1", vars(defining))
    importing.cut = defining.cut
    monkeypatch.setitem(sys.modules, "megatron.stand_in", defining)
    monkeypatch.setitem(sys.modules, "megatron.stand_in_user", importing)
    monkeypatch.setattr(patches, "installed_version", lambda: "0.19.2")
    return defining, importing


def cut(original, batch, *args, **kwargs):
    """Cut batches to sub-sequences."""
    return "ours", original(batch, *args, **kwargs)


def forward(original, layer, x):
    """Attend to earlier sub-sequences."""
    return "ours", original(layer, x)


def of_another_name(original, rank):
    """Cut batches to sub-sequences."""


def at_another_place(original, group, batch):
    """Cut batches to sub-sequences."""


def by_another_name(original, *args, rank, **kwargs):
    """Cut batches to sub-sequences."""


def test_replaces_where_defined_and_where_imported(upstream):
    defining, importing = upstream
    apply_all([Patch("megatron.stand_in:cut", cut)])
    assert defining.cut(1, 2) == importing.cut(1, 2) == ("ours", ("upstream", 1))


def test_replaces_methods(upstream):
    defining, _ = upstream
    apply_all([Patch("megatron.stand_in:Layer.forward", forward)])
    assert defining.Layer().forward(1) == ("ours", 2)


@pytest.mark.parametrize(
    "target,replacement,complaint",
    [
        ("megatron.stand_in:slice", cut, "megatron.stand_in:slice .* is not there"),
        ("megatron.stand_in:Layer.back", cut, "is not there"),
        ("megatron.nowhere:cut", cut, "is not there"),
        ("megatron.stand_in:cut", of_another_name, "has no parameter rank any more"),
        ("megatron.stand_in:cut", by_another_name, "has no parameter rank any more"),
        ("megatron.stand_in:cut", at_another_place, "has group at place 1, not 0"),
    ],
)
def test_a_changed_symbol_stops_before_anything_is_replaced(
    upstream, target, replacement, complaint
):
    defining, _ = upstream
    before = defining.cut
    with pytest.raises(UnsupportedMegatronError, match=complaint) as error:
        apply_all([Patch("megatron.stand_in:cut", cut), Patch(target, replacement)])
    assert "Cut batches to sub-sequences." in str(error.value)
    assert "megatron-core>=0.19.2,<0.20" in str(error.value)
    assert defining.cut is before


@pytest.mark.parametrize("version", ["0.18.0", "0.19.1", "0.20.0", "1.0.0"])
def test_versions_that_are_not_supported(upstream, monkeypatch, version):
    defining, _ = upstream
    before = defining.cut
    monkeypatch.setattr(patches, "installed_version", lambda: version)
    with pytest.raises(UnsupportedMegatronError, match=rf"{version} is not supported; install"):
        apply_all([Patch("megatron.stand_in:cut", cut)])
    assert defining.cut is before
