"""Let faults befall one rank of a training job, and write down what happens: docs/reliability.md.

    python benchmarks/faults.py                 # all rows, about 15 minutes
    python benchmarks/faults.py --only kill:1 F:0

Each job trains a tiny GPT on 2 stages with checkpoints, meets a fault in its fifth iteration, and
is resumed without it. A row says how long the job took to end after the fault, the error that
torchrun shows as root cause, and whether the resumed losses are those of a job that met no fault.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from report import device_name, setting

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "distributed" / "scripts" / "faulty_gpt.py"
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
ITERATIONS, FAULT_AT, SAVED = 8, 5, 4
TIMEOUT_MINUTES = 1
SOON = 15.0
GRACE = 60.0

FAULTS = {
    "kill:0": "SIGKILL of rank 0",
    "kill:1": "SIGKILL of rank 1",
    "stop:0": "SIGSTOP of rank 0",
    "stop:1": "SIGSTOP of rank 1",
    "leave:1": "rank 1 exits with code 0",
    "F:0": "an error in an F of stage 0",
    "F:1": "an error in an F of stage 1",
    "B:1": "an error in a B of stage 1",
    "I:1": "an error in an I of stage 1",
    "W:1": "an error in a W of stage 1",
    "SEND_F:0": "an error in a send of stage 0",
    "RECV_F:1": "an error in a receive of stage 1",
    "settings:1": "rank 1 has another --seq1f1b-balance-method",
    "memory:1": "no memory is left on rank 1",
    "worker:0": "the data worker of rank 0 is killed",
    "end:0": "the data of rank 0 end inside a step",
    "terminate": "SIGTERM of torchrun",
}


@dataclass(frozen=True)
class Outcome:
    """What one fault led to.

    seconds: from the fault to the end of the job. cause: the error shown as root cause. kept: the
    iteration of the last checkpoint. is_equal: whether the resumed losses are the undisturbed ones.
    """

    fault: str
    seconds: float
    exit_code: int
    cause: str
    kept: int
    is_equal: bool

    @property
    def time_class(self) -> str:
        """How long the job lived on, in classes that machines share."""
        if self.seconds < SOON:
            return f"under {SOON:.0f} s"
        limit = TIMEOUT_MINUTES * 60 + GRACE
        return "within the timeout + 60 s" if self.seconds < limit else "longer"


def command(
    folder: Path,
    *,
    resume: bool,
    split: bool = False,
    iterations: int = ITERATIONS,
    saves: int = SAVED // 2,
) -> list[str]:
    """Return the command of one job; ``split``: with weight gradients apart."""
    flags = (
        "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
        "--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 3 --vocab-size 100 "
        f"--train-iters {iterations} --eval-iters 0 --eval-interval 99 --lr 1e-3 "
        "--attention-dropout 0 --hidden-dropout 0 --log-interval 1 --position-embedding-type rope "
        "--num-workers 1 --pipeline-model-parallel-size 2 --seq1f1b-splits 3 --ckpt-format "
        f"torch_dist --save-interval {saves} --distributed-timeout-minutes {TIMEOUT_MINUTES}"
    )
    files = ["--save", folder / "checkpoint", "--seq1f1b-metrics-file", folder / "metrics.jsonl"]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron.adaptor", str(SCRIPT), *shlex.split(flags), *map(str, files)),
        *(["--load", str(folder / "checkpoint")] if resume else []),
        *(["--seq1f1b-schedule", "zb-h1"] if split else []),
    ]


def run(folder: Path, fault: str | None, *, resume: bool = False) -> tuple[int, float, str]:
    """Run one job; return its exit code, seconds since its fourth iteration, and its output."""
    kind = (fault or "none").partition(":")[0]
    environment = {
        **os.environ,
        "FAULT": f"{fault}:{FAULT_AT}" if fault and ":" in fault else "none:-1:-1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(folder, resume=resume, split=kind in ("I", "W")),
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        begun = time.monotonic()
        met: float | None = None
        while process.poll() is None:
            time.sleep(0.1)
            if met is None and len(losses(folder)) >= FAULT_AT - 1:
                met = time.monotonic()
                if fault == "terminate":
                    process.send_signal(signal.SIGTERM)
            if time.monotonic() - (met or begun) > TIMEOUT_MINUTES * 60 + 4 * GRACE:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, time.monotonic() - (met or begun), log.read_text(errors="replace")


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of every iteration in the metrics file."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return {}
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return {entry["iteration"]: entry["lm_loss"] for entry in entries}


def cause(text: str) -> str:
    """Return the error that torchrun shows as the first to be observed, on one line."""
    root = text.rpartition("Root Cause (first observed failure)")[2]
    found = re.findall(r"^\s*(?:[\w.]+\.)?(\w+Error: .*)$", root, re.MULTILINE)
    if found:
        return re.sub(r"\[/\S+\] ", "", found[-1].strip())  # where gloo's sources were compiled
    signalled = re.search(r"traceback : (Signal .* received)", root)
    rank = re.search(r"rank\s+: (\d+)", root)
    if signalled and rank:
        return f"{signalled[1]} by rank {rank[1]}"
    plain = re.findall(r"(\w+Exception: .*)$", text, re.MULTILINE)
    return plain[-1].strip() if plain else text.strip().splitlines()[-1]


def befall(fault: str, undisturbed: dict[int, float]) -> Outcome:
    """Run a job that meets ``fault``, and resume it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, seconds, text = run(folder, fault)
        tracker = folder / "checkpoint" / "latest_checkpointed_iteration.txt"
        kept = int(tracker.read_text()) if tracker.exists() else 0
        run(folder, None, resume=True)
        resumed = losses(folder)
    same = resumed.keys() == undisturbed.keys() and all(
        abs(resumed[i] - undisturbed[i]) <= 1e-6 * abs(undisturbed[i]) for i in undisturbed
    )
    return Outcome(fault, round(seconds, 1), code, cause(text), kept, same)


def page(outcomes: list[Outcome]) -> str:
    """Return docs/reliability.md's table."""
    rows = [
        f"| {FAULTS[o.fault]} | {o.time_class} | {o.cause.replace('|', '/')} | {o.kept} | "
        f"{'yes' if o.is_equal else 'no'} |"
        for o in outcomes
    ]
    return "\n".join(
        [
            "| fault, in iteration 5 | the job ends | root cause shown by torchrun | kept | equal "
            "|",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def write_section(name: str, text: str) -> None:
    """Replace what docs/reliability.md has between the marks of ``name``."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, _, rest = PAGE.read_text().partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(before + begin + text + end + after)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="*",
        choices=FAULTS,
        metavar="FAULT",
        default=list(FAULTS),
        help=f"these alone; the stored rows of others stay; of {', '.join(FAULTS)}",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        code, _, text = run(Path(name), None)
        if code:
            sys.exit(text)
        undisturbed = losses(Path(name))
    rows = json.loads(RESULTS.read_text())["faults"] if RESULTS.exists() else []
    stored = {row["fault"]: Outcome(**row) for row in rows}
    for fault in options.only:
        stored[fault] = befall(fault, undisturbed)
        print(json.dumps(asdict(stored[fault])), flush=True)
    outcomes = [stored[fault] for fault in FAULTS if fault in stored]
    RESULTS.write_text(
        json.dumps(
            {**setting(device=device_name()), "faults": [asdict(o) for o in outcomes]}, indent=1
        )
        + "\n"
    )
    write_section("faults", page(outcomes))


if __name__ == "__main__":
    main()
