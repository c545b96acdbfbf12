"""The bench that sweeps are tried on."""

import pytest

from tests.seq1f1b_tools.sweep.bench import Bench


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)
