"""The messages that docs/troubleshooting.md quotes are those that the code prints."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("megatron/adaptor", "seq1f1b", "seq1f1b_tools")
_ROW = re.compile(r"^\| `(.+?)` \| .+ \| .+ \|$")


def quoted() -> list[str]:
    """Return the messages of the page."""
    lines = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    return [row[1] for line in lines if (row := _ROW.match(line))]


def in_source() -> str:
    """Return all texts of the sources, one a line, with ... for what a run fills in."""
    texts = []
    for folder in SOURCES:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (x.value if isinstance(x, ast.Constant) else "..." for x in node.values)
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


@pytest.fixture(scope="module")
def source() -> str:
    return in_source()


def test_every_row_quotes_a_message():
    lines = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    rows = [x for x in lines if x.startswith("| ") and not x.startswith("| message ")]
    assert len(rows) == len(quoted()) >= 30


@pytest.mark.parametrize("message", quoted())
def test_the_message_is_in_the_source(source, message):
    assert message in source
