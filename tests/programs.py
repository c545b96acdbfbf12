"""Programs that tests run in a process of their own, since the adaptor changes torch for good."""

import json
import os
import subprocess
import sys
from typing import Any

_MARK = "ANSWER"


def ask(program: str, question: Any, **environ: str) -> Any:
    """Return what ``program`` prints as JSON behind ANSWER when it reads ``question`` as JSON."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = next(line for line in run.stdout.splitlines() if line.startswith(_MARK))
    return json.loads(found.removeprefix(_MARK))
