"""Errors of ours share one base, beside the built-in exception of their kind."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("seq1f1b", "seq1f1b_tools", "megatron/adaptor")


def test_every_error_can_be_caught_as_ours():
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and re.fullmatch(r"[A-Z]\w+Error", node.name)
    }
    assert len(bases) > 30
    assert bases.pop("Seq1F1BError") == ["Exception"]
    assert [
        name for name, (first, *_) in bases.items() if first not in {"Seq1F1BError", *bases}
    ] == []
