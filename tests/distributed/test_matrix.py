"""Every pair of choices in the matrix works or is refused, and docs/compatibility.md says which.

Refusals are found by asking Megatron's command line; every pair that is not refused is in at least
one step whose gradients are compared with a single process. To write the page anew:
WRITE_COMPATIBILITY=1 pytest --all tests/distributed/test_matrix.py
"""

import os
from itertools import combinations
from pathlib import Path

import pytest

from tests.distributed.compatibility import Pair, page
from tests.distributed.matrix import MATRIX, Row, case_of, flags_of
from tests.distributed.megatron_model import worst_gradient_error
from tests.programs import ask

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
NUM_RANKS = (2, 4, 8)
# Reads lists of alternatives [number of ranks, command line]; answers for each list with the
# refusal of its first, or None if one of them is accepted.
_PROGRAM = """
import contextlib, io, json, os, sys
from megatron.adaptor import install
install()
from megatron.adaptor.command_line.refusals import settings_from
from megatron.training.arguments import validate_args
from tests.programs import parse_args
def refusal(ranks, argv):
    sys.argv = ["script", *argv]
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        args = parse_args()
        validate_args(args)
        _, faults = settings_from(args)
        return faults[0] if faults else None
    except SystemExit as error:
        return str(error.code).strip().splitlines()[-1].removeprefix("  - ")
    except (AssertionError, ValueError) as error:
        return f"Megatron: {str(error).strip() or type(error).__name__}"

answers = []
for alternatives in json.loads(sys.stdin.read()):
    with contextlib.redirect_stdout(io.StringIO()):
        whys = []
        for alternative in alternatives:
            whys.append(refusal(*alternative))
            if whys[-1] is None:
                break
        answers.append(None if None in whys else whys[0])
print("ANSWER" + json.dumps(answers))
"""
_PLAINEST = {key: next(iter(options)) for key, options in MATRIX.items()}


def rows_with(pair: Pair) -> list[Row]:
    """Return the plainest rows that have ``pair``: with experts too, which some choices need."""
    a, one, b, other = pair
    chosen = {a: one, b: other}
    models = [_PLAINEST["Model"], "Mixtral"] if "Model" not in chosen else [chosen["Model"]]
    return [tuple({**_PLAINEST, "Model": model, **chosen}.values()) for model in models]


def every_pair() -> list[Pair]:
    return [
        (a, one, b, other)
        for a, b in combinations(MATRIX, 2)
        for one in MATRIX[a]
        for other in MATRIX[b]
    ]


def pairs_in(chosen: dict[str, str]) -> set[Pair]:
    named = [(key, chosen[key]) for key in MATRIX if key in chosen]
    return {(a, one, b, other) for (a, one), (b, other) in combinations(named, 2)}


@pytest.fixture(scope="module")
def refusals() -> dict[Pair, str | None]:
    """What the command line says to each pair: why not, or None."""
    pairs = every_pair()
    asked = [[(case_of(row).num_ranks, flags_of(row)) for row in rows_with(pair)] for pair in pairs]
    return dict(zip(pairs, ask(_PROGRAM, asked, RANK="0"), strict=True))


@pytest.fixture(scope="module")
def rows(refusals) -> list[Row]:
    """Rows that have every pair that is not refused, and none that is."""
    refused = {pair for pair, why in refusals.items() if why is not None}
    missing = dict.fromkeys(pair for pair in refusals if pair not in refused)
    rows = []
    while missing:
        a, one, b, other = next(iter(missing))
        row = complete({a: one, b: other}, refused, missing)
        assert row, f"{a} {one} with {b} {other} goes with nothing"
        rows.append(row)
        for pair in pairs_in(dict(zip(MATRIX, row, strict=True))):
            missing.pop(pair, None)
    return rows


def complete(chosen: dict[str, str], refused: set[Pair], missing: dict[Pair, None]) -> Row | None:
    """Return a row with what is ``chosen``, without pairs that are refused; None if none is left.

    Each choice that is open takes the option with most pairs that are still ``missing``.
    """
    if pairs_in(chosen) & refused:
        return None
    key = next((key for key in MATRIX if key not in chosen), None)
    if key is None:
        return tuple(chosen[key] for key in MATRIX)

    def new_pairs(option: str) -> int:
        return len(pairs_in({**chosen, key: option}) & missing.keys())

    for option in sorted(MATRIX[key], key=new_pairs, reverse=True):
        row = complete({**chosen, key: option}, refused, missing)
        if row is not None:
            return row
    return None


@pytest.fixture(scope="module")
def seen() -> dict[Row, float]:
    """The largest error of any gradient, for each row that ran."""
    return {}


def errors(rows: list[Row]) -> list[float]:
    return [worst_gradient_error(case_of(row)) for row in rows]


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_gradients(workers, rows, seen, num_ranks):
    mine = [row for row in rows if case_of(row).num_ranks == num_ranks]
    by_rank = workers(num_ranks).run(errors, mine, timeout=500)
    if num_ranks > 2:  # the process groups of this many layouts have hundreds of threads that poll
        workers(num_ranks).close()
    for row, *found in zip(mine, *by_rank, strict=True):
        seen[row] = max(found)
        assert seen[row] < 1e-5, row


def test_every_number_of_ranks_runs(rows):
    assert {case_of(row).num_ranks for row in rows} == set(NUM_RANKS)


def test_the_page_says_what_was_seen(rows, seen, refusals):
    if set(seen) != set(rows):
        pytest.skip("needs the outcome of test_gradients for every number of ranks")
    expected = page(refusals, seen)
    if os.environ.get("WRITE_COMPATIBILITY"):
        PAGE.write_text(expected)
    assert PAGE.read_text() == expected
