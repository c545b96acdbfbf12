"""A sweep on a training script that writes figures, fails, or runs out of memory as told."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from seq1f1b_tools.sweep.corpus import Corpus
from seq1f1b_tools.sweep.main import sweep_and_report
from seq1f1b_tools.sweep.nodes import Nodes
from seq1f1b_tools.sweep.settings import (
    ROOT,
    Settings,
    read_settings,
)
from seq1f1b_tools.sweep.sweep import Sweep

# Stands for the training script: what it does to a run is in behaviour.json, by the run's name.
FAKE_SCRIPT = """
import json, sys, time
from pathlib import Path

def flag(name, kind=int):
    return kind(sys.argv[sys.argv.index(name) + 1])

folder = Path(__file__).parent
metrics = flag("--seq1f1b-metrics-file", Path)
name = metrics.stem
with (folder / "calls").open("a") as calls:
    calls.write(name + chr(10))
behaviour = json.loads((folder / "behaviour.json").read_text()).get(name, "ok")
splits, stages = flag("--seq1f1b-splits"), flag("--pipeline-model-parallel-size")
if behaviour == "fails on both nodes":
    while (folder / "calls").read_text().split().count(name) < 2:
        time.sleep(0.02)
if behaviour.startswith("fails"):
    raise ValueError("the loss went through the roof")
num_iterations = flag("--train-iters") - (behaviour == "stops early")
metrics.parent.mkdir(parents=True, exist_ok=True)
for iteration in range(1, num_iterations + 1):
    if behaviour == "oom" and iteration == 2:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes")
    if behaviour == "hangs" and iteration == 2:
        time.sleep(600)
    milliseconds = 1000 / splits if iteration > 2 else 5000.0
    with metrics.open("a") as stream:
        stream.write(json.dumps({
            "iteration": iteration,
            "lm_loss": 8.0 - 0.1 * iteration + (1e-6 if splits > 1 else 0.0),
            "milliseconds": milliseconds,
            "tokens_per_second": 4096e3 / milliseconds,
            "tflops_per_device": 1 / milliseconds,
            "peak_activation_bytes": [2**20 * (stages - i) * 100 // splits for i in range(stages)],
            "kv_carry_bytes": [0] * stages,
            "bubble_ratio": [0.2 / splits] * stages,
            "action_milliseconds": [
                {f"0{kind}.{j}": 100 / splits for kind in "FB" for j in range(splits)}
            ] * stages,
        }) + chr(10))
"""
FAST = {"SEQ_LENGTHS": "64", "MICRO_BATCHES": "2", "TRAIN_ITERS": "4", "TAKE_TURNS": "0"}
BASELINE = "tiny-seq64-tp1-pp2-m2-1f1b"
AVERAGE = "tiny-seq64-tp1-pp2-m2-seq1f1b-s4-average"
UNIFORM = "tiny-seq64-tp1-pp2-m2-seq1f1b-s4-uniform_comp"


class Bench:
    """A folder with the fake script, data that needs no making, and what the sweep left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "fake.py"
        self.script.write_text(FAKE_SCRIPT)
        self.output = folder / "out"
        self.text = ""
        self.behave()

    def behave(self, **behaviour: str) -> None:
        names = {"baseline": BASELINE, "average": AVERAGE, "uniform": UNIFORM}
        text = json.dumps({names[key]: value for key, value in behaviour.items()})
        (self.folder / "behaviour.json").write_text(text)

    def environ(self, **variables: str) -> dict[str, str]:
        folders = {"OUTPUT": str(self.output), "DATA": str(self.folder / "data")}
        return {**FAST, **folders, **variables}

    def settings(self, **variables: str) -> Settings:
        return read_settings(self.environ(**variables), num_gpus=0)

    def sweep(self, **variables: str) -> int:
        """Run the sweep; returns its exit status."""
        settings = self.settings(**variables)
        stream = io.StringIO()
        sweep = Sweep(
            settings,
            Nodes(settings.cluster),
            Console(file=stream, width=160),
            self.script,
            lambda run, port: [sys.executable],
            make_no_data,
        )
        try:
            return sweep_and_report(sweep)
        finally:
            self.text = stream.getvalue()

    def calls(self) -> list[str]:
        """The runs that were started since the last time, in order."""
        file = self.folder / "calls"
        names = file.read_text().split() if file.exists() else []
        file.unlink(missing_ok=True)
        return names

    def rows(self) -> dict[str, dict[str, str]]:
        with (self.output / "results.csv").open() as stream:
            return {row["name"]: row for row in csv.DictReader(stream)}


def make_no_data(settings: Settings) -> Corpus:
    """Empty files where the data would be."""
    corpus = Corpus.of(settings)
    corpus.tokenizer.mkdir(parents=True, exist_ok=True)
    for path in (corpus.documents, corpus.tokenizer / "tokenizer.json"):
        path.touch()
    for suffix in (".bin", ".idx"):
        corpus.prefix.with_suffix(suffix).touch()
    return corpus


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import os
from rich.console import Console
from seq1f1b_tools.sweep import main as entry
from seq1f1b_tools.sweep.sweep import Sweep
from tests.seq1f1b_tools.sweep.bench import make_no_data

class FakeSweep(Sweep):
    def __init__(self, settings, nodes, console):
        script = Path(sys.argv[2])
        super().__init__(settings, nodes, console, script, launcher, make_no_data)

launcher = None if "torchrun" in sys.argv else lambda run, port: [sys.executable]
entry.Sweep = FakeSweep
sys.exit(entry.main([], os.environ, num_gpus=0))
"""


def start(bench: Bench, *options: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(ROOT), str(bench.script), *options],
        env={**os.environ, **bench.environ(**variables)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def report_pids(bench: Bench, *, ignoring: bool = False) -> Callable[[], list[int]]:
    """Let each process of a run note its number; returns what reads those that are there."""
    more = "import os, signal\n"
    more += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignoring else ""
    more += "(Path(__file__).parent / f'pid-{os.getpid()}').touch()\n"
    bench.script.write_text(
        FAKE_SCRIPT.replace(
            "import json, sys, time\n", f"import json, sys, time\nfrom pathlib import Path\n{more}"
        )
    )
    return lambda: [int(file.name.removeprefix("pid-")) for file in bench.folder.glob("pid-*")]
