"""The guide's lists of families are those that the tests run."""

from pathlib import Path

from tests.ulysses.families import FAMILIES
from tests.ulysses.test_refusals import REFUSED

GUIDE = Path(__file__).parents[2] / "docs" / "ulysses.md"


def rows() -> list[str]:
    """Return the table of the guide, a model type a row."""
    exact: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        variants = exact.setdefault(family.model_type, [])
        if ", " in name:
            variants.append(name.split(", ", 1)[1])
    lines = [f"| {name} | exact | {'; '.join(with_)} |" for name, with_ in sorted(exact.items())]
    # minimax is exact with full attention only, and in both lists
    return [*lines, *(f"| {name} | refused | {why} |" for name, why in sorted(REFUSED.items()))]


def test_the_guide_lists_the_families_of_the_tests():
    written = [line for line in GUIDE.read_text().splitlines() if line.endswith(" |")]
    assert [x for x in written if "| exact |" in x or "| refused |" in x] == rows()
