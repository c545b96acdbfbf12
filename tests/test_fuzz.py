"""Some of the cases of ``python -m tests.fuzz``, which tries others with another seed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.selection import mostly_long

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cases", mostly_long([60, 300], default=[60]))
def test_damaged_files_and_settings_end_with_a_result_or_a_clear_error(cases):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--cases", str(cases), "--seed", "17"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "0 faults" in run.stdout
