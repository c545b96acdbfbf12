"""The faults of tests/mutants.py are about code that is there; `-m tests.mutants` runs them."""

import pytest

from tests.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_is_current(mutant):
    assert mutant.is_current
    assert mutant.text != mutant.becomes
