"""Try a checkout of Megatron-LM: do the patches fit, and are losses those of one split?

    python -m tests.try_megatron PATH/TO/Megatron-LM

Outside of CI, which runs the versions that are supported.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.training_runs import ARGUMENTS, SCRIPTS

_PATCHES = """
import json
from megatron.adaptor.cpu import device
device.install()
import megatron.core
from megatron.adaptor import patches
from megatron.adaptor.session import Session
faults = []
for patch in Session("cpu").patches():
    try:
        patch.original()
    except patches.UnsupportedMegatronError as error:
        faults.append(str(error))
print(json.dumps([megatron.core.__file__, patches.installed_version(), faults]))
"""
# Runs a script whatever the version is.
_RUNNER = """
import runpy, sys
from megatron.adaptor import patches
patches.SUPPORTED_VERSIONS = ">=0"
from megatron.adaptor import install
install()
sys.argv = sys.argv[1:]
sys.path.insert(0, {scripts!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def environment(checkout: Path) -> dict[str, str]:
    """Return an environment in which Megatron comes from ``checkout``."""
    path = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def losses(checkout: Path, splits: int) -> list[float]:
    """Train a tiny model on two stages; raises RuntimeError with the end of the output."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runner = folder / "runner.py"
        runner.write_text(_RUNNER.format(scripts=str(SCRIPTS)))
        metrics = folder / "metrics.jsonl"
        run = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", "2", str(runner), str(SCRIPTS / "plain_gpt.py"), *ARGUMENTS),
                *("--pipeline-model-parallel-size", "2", "--seq1f1b-splits", str(splits)),
                *("--seq1f1b-metrics-file", str(metrics)),
            ],
            env=environment(checkout),
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(run.stderr[-4000:])
        return [json.loads(line)["lm_loss"] for line in metrics.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    checkout = parser.parse_args(arguments).checkout.resolve()
    if not (checkout / "megatron" / "core").is_dir():
        parser.error(f"{checkout}: is no checkout of Megatron-LM: it has no megatron/core")
    run = subprocess.run(
        [sys.executable, "-c", _PATCHES],
        env=environment(checkout),
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        sys.exit(run.stderr)
    file, version, faults = json.loads(run.stdout.splitlines()[-1])
    print(f"megatron-core {version}, {file}")
    for fault in faults:
        print(f"  {fault}")
    if faults:
        return 1
    print("all patches fit")
    one, three = losses(checkout, 1), losses(checkout, 3)
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, three, strict=True))
    print(f"losses of 1 and 3 splits differ by {worst:.1e} at most over {len(one)} iterations")
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
