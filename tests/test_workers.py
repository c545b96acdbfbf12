"""Worker ranks end with the process that started them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import is_alive, wait_for

ROOT = Path(__file__).parents[1]
_PROGRAM = """
import os, sys, time
from tests.workers import WorkerPool
if __name__ == "__main__":
    pool = WorkerPool(2)
    print(*pool.run(os.getpid), flush=True)
    time.sleep(60)
"""


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_workers_of_a_killed_runner_are_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    runner = subprocess.Popen(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert runner.stdout is not None
    pids = list(map(int, runner.stdout.readline().split()))
    assert len(pids) == 2
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    wait_for(lambda: not any(map(is_alive, pids)), seconds=10)
