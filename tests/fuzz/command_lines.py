"""Cases for the simulator's command line, the sweep's environment, and the sweep's results."""

import contextlib
import io
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from seq1f1b.cli import app
from seq1f1b.schedule import interleaved, one_f_one_b, zb_h1
from seq1f1b.timeline import write_trace
from seq1f1b_tools.sweep import sweep as sweep_module
from seq1f1b_tools.sweep.launch import Job, Outcome
from seq1f1b_tools.sweep.main import sweep_and_report
from seq1f1b_tools.sweep.nodes import Nodes
from seq1f1b_tools.sweep.plan import plan_runs, why_not
from seq1f1b_tools.sweep.records import OutputError
from seq1f1b_tools.sweep.settings import VARIABLES, SettingsError, read_settings
from tests.fuzz.mutate import TEXTS, copy, damage_file, damage_folder
from tests.fuzz.watch import call, expect
from tests.seq1f1b_tools.sweep.bench import make_no_data
from tests.timeline.drawn import planned


class Trace:
    """A measured trace with up to two damages, and numbers that make no sense."""

    def __init__(self, base: Path) -> None:
        self.files = []
        schedules = one_f_one_b(2, 3, 2), zb_h1(2, 2, 2), interleaved(2, 2, 2, 2)
        for number, schedule in enumerate(schedules):
            file = base / f"{number}.jsonl"
            with file.open("w") as stream:
                for stage, spans in enumerate(planned(schedule).stages):
                    write_trace(stream, stage, spans)
            self.files.append(file)

    def run(self, dice: random.Random, folder: Path) -> bool:
        """Simulate, compare or draw it."""
        file = folder / "trace.jsonl"
        file.write_bytes(dice.choice(self.files).read_bytes())
        for _ in range(dice.choice((0, 1, 1, 2))):
            damage_file(dice, file)
        command = dice.choice(("simulate", "compare", "timeline"))
        arguments = [command, "--trace", str(file)]
        if dice.random() < 0.2:
            arguments += [dice.choice(("--latency", "--backward-ratio")), dice.choice(TEXTS)]
        if dice.random() < 0.2:
            flag = dice.choice(("--stages", "--chunks", "--microbatches", "--splits", "--width"))
            arguments += [flag, dice.choice(("1", "2", "3", *TEXTS))]
        if command != "timeline":
            arguments += ["--json"]
        elif dice.random() < 0.3:
            suffix = dice.choice((".txt", ".json", ".html", ".svg", ".gif", ""))
            arguments += ["--output", str(folder / f"out{suffix}")]
        main = typer.main.get_command(app).main
        run = call(lambda: main(arguments, prog_name="seq1f1b"))
        expect(run.status in (0, 2), f"ends with {run.status!r}: {run.err[-500:]}")
        if run.status == 2:
            expect(bool(run.err.strip()), "says nothing")
            return False
        if command != "timeline":
            json.loads(run.out, parse_constant=_no_constant)
        return True


def _no_constant(text: str) -> None:
    expect(False, f"prints {text}")


class Environment:
    """Variables of the sweep and of SLURM, of which some make no sense."""

    def __init__(self, base: Path) -> None:
        del base
        self.names = [variable.name for variable in VARIABLES]
        self.names += ["SLURM_NNODES", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_NODELIST"]

    def run(self, dice: random.Random, folder: Path) -> bool:
        """Read the settings and plan the runs."""
        environ = {"OUTPUT": str(folder / "out"), "DATA": str(folder / "data")}
        for _ in range(dice.randrange(1, 5)):
            name = dice.choice(self.names)
            known = {v.name: (v.cpu, v.gpu) for v in VARIABLES}.get(name, ("1", "2"))
            environ[name] = dice.choice((*TEXTS, *known)).replace("\0", "")
        try:
            settings = read_settings(environ, dice.choice((0, 0, 1, 8)))
        except SettingsError as error:
            expect(0 < len(str(error)) < 5000, f"a message of {len(str(error))} signs")
            return False
        for run in plan_runs(settings):
            reason = why_not(run, settings)
            expect(len(reason) < 1000, f"a reason of {len(reason)} signs")
            expect("/" not in run.name, f"a run that is named {run.name}")
            expect(math.isfinite(run.speedup), "a speedup that is not finite")
        return True


_VARIABLES = {"SEQ_LENGTHS": "64", "MICRO_BATCHES": "2", "TRAIN_ITERS": "4", "TAKE_TURNS": "0"}


class ExpLogs:
    """Results of a sweep with up to two damages, taken up again."""

    def __init__(self, base: Path) -> None:
        self.base = base / "results"
        self.rows = self._sweep(self.base)[0]

    def _sweep(self, folder: Path) -> tuple[list[dict[str, Any]], int]:
        environ = _VARIABLES | {"OUTPUT": str(folder / "out"), "DATA": str(folder / "data")}
        settings = read_settings(environ, 0)
        stream = io.StringIO()
        sweep = sweep_module.Sweep(
            settings, Nodes(settings.cluster), Console(file=stream, width=160),
            prepare=make_no_data,
        )  # fmt: skip
        with _launching(_pretend):
            status = sweep_and_report(sweep)
        return [result.row() for result in sweep.results()], status

    def run(self, dice: random.Random, folder: Path) -> bool:
        """Sweep again: whatever is damaged is repeated, and the figures are the same."""
        results = copy(self.base, folder / "results")
        for _ in range(dice.choice((0, 1, 1, 2))):
            damage_folder(dice, results / "out")
        refused = []

        def again() -> int:
            try:
                rows, status = self._sweep(results)
            except OutputError as error:
                refused.append(str(error))
                return 2
            own = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
            before = [{k: v for k, v in row.items() if k != "seconds"} for row in self.rows]
            if status == 0 and own != before:
                expect(_only_other_numbers(own, before), f"other figures: {own}")
            return status

        run = call(again)
        expect(run.status in (0, 1, 2), f"ends with {run.status!r}")
        expect(run.status != 2 or bool(refused), "says nothing")
        return run.status != 2


def _only_other_numbers(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> bool:
    """Whether rows differ only in figures: one digit more or less cannot be seen in a file."""
    names = [[row[key] for key in ("name", "status", "m", "s", "p")] for row in rows]
    return names == [[row[key] for key in ("name", "status", "m", "s", "p")] for row in before]


@contextlib.contextmanager
def _launching(function: Callable[..., Any]) -> Any:
    before = sweep_module.launch
    sweep_module.launch = function
    try:
        yield
    finally:
        sweep_module.launch = before


def _pretend(jobs: Sequence[Job], timeout: float, tick: Callable[[float], None]) -> list[Outcome]:
    """Write what training would write."""
    for job in jobs:
        words = dict(zip(job.command, job.command[1:], strict=False))
        splits = int(words["--seq1f1b-splits"])
        lines = [
            {
                "iteration": iteration,
                "lm_loss": 8.0 - 0.1 * iteration,
                "milliseconds": 1000.0 / splits,
                "tokens_per_second": 4096.0 * splits,
                "tflops_per_device": 0.1 * splits,
                "peak_activation_bytes": [2**20, 2**19],
                "kv_carry_bytes": [0, 0],
                "bubble_ratio": [0.2, 0.1],
            }
            for iteration in range(1, 5)
        ]
        file = Path(words["--seq1f1b-metrics-file"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text("$\n")
        tick(0.0)
        job.ended()
    return [Outcome("ok", "", 1.0) for _ in jobs]
