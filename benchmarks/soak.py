"""Train for 300 iterations while ranks are killed at random, and beside it undisturbed.

    python benchmarks/soak.py                   # about 10 minutes
    python benchmarks/soak.py --iterations 40 --kills 1 --no-page

The job that is killed is started again until it is done; its losses must be those of the
undisturbed one, whose memory, threads and open files must not grow. The exit status is 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from faults import ROOT, command, losses, write_section
from report import device_name, setting

RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
SAVES = 10
RANKS = 2
TOLERANCE = 1e-6
MOST_GROWTH = {"memory_mib": 0.03, "threads": 0.0, "files": 0.0}
LATE = 1800.0

Watcher = Callable[[list[int], int], bool]
"""Gets the ranks' processes and how many iterations are done; whether the job is to be killed."""


def ranks_of(launcher: int) -> list[int]:
    """Return the processes of the ranks, in no order."""
    try:
        text = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def usage(process: int) -> dict[str, float]:
    """Return a process's resident memory in MiB, its threads and its open files."""
    status = Path(f"/proc/{process}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "memory_mib": int(values["VmRSS"].split()[0]) / 1024,
        "threads": int(values["Threads"]),
        "files": len(os.listdir(f"/proc/{process}/fd")),
    }


def run(folder: Path, iterations: int, watch: Watcher) -> int:
    """Run a job in ``folder``, from its last checkpoint on; return torchrun's exit code."""
    environment = {
        **os.environ,
        "FAULT": "none:-1:-1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    begun = time.monotonic()
    with (folder / "log").open("a") as stream:
        process = subprocess.Popen(
            command(folder, resume=True, iterations=iterations, saves=SAVES),
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
        while process.poll() is None:
            time.sleep(0.05)
            ranks = ranks_of(process.pid)
            if len(ranks) == RANKS and watch(ranks, done(folder)):
                os.kill(random.choice(ranks), signal.SIGKILL)
                process.wait()
            if time.monotonic() - begun > LATE:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


def done(folder: Path) -> int:
    """Return how many iterations the metrics file has; a line may be half written."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def undisturbed(folder: Path, iterations: int) -> dict[str, list[float]]:
    """Run a job, reading what its ranks use; return, by kind, the most of any rank at each time."""
    seen: dict[int, dict[str, float]] = {}

    def watch(ranks: list[int], iteration: int) -> bool:
        if iteration not in seen:
            with contextlib.suppress(OSError, KeyError):  # a rank has just ended
                both = [usage(rank) for rank in ranks]
                seen[iteration] = {name: max(one[name] for one in both) for name in both[0]}
        return False

    if code := run(folder, iterations, watch):
        sys.exit(f"the undisturbed job failed with {code}:\n{(folder / 'log').read_text()[-3000:]}")
    # From where the first checkpoints have been written, to before the ranks take leave.
    steady = [seen[i] for i in sorted(seen) if 3 * SAVES < i < iterations - 1]
    return {name: [one[name] for one in steady] for name in MOST_GROWTH}


def disturbed(folder: Path, iterations: int, kills: int) -> list[int]:
    """Run a job that is killed ``kills`` times; return after how many iterations of it."""
    at = sorted(random.sample(range(SAVES, iterations), kills))
    met: list[int] = []
    while True:
        goal = at[len(met)] if len(met) < kills else iterations + 1
        code = run(folder, iterations, lambda _, iteration, goal=goal: iteration >= goal)
        if code == 0:
            return met
        if len(met) == kills:
            sys.exit(f"the job failed by itself:\n{(folder / 'log').read_text()[-3000:]}")
        met.append(done(folder))
        print(f"killed after iteration {met[-1]}", flush=True)


def growth(values: list[float]) -> float:
    """Return by how much the last third is above the first, as a fraction of it; from medians."""
    third = max(1, len(values) // 3)
    first, last = statistics.median(values[:third]), statistics.median(values[-third:])
    return (last - first) / first


def page(found: dict) -> str:
    """Return docs/reliability.md's section."""
    grown = found["growth"]
    text = (
        f"Seed {found['seed']}: {found['iterations']} iterations on {RANKS} stages, a checkpoint "
        f"every {SAVES}. A rank was killed {len(found['killed_after'])} times, after iterations "
        f"{', '.join(map(str, found['killed_after']))}. The greatest relative difference of a "
        f"loss from that of the undisturbed job is {found['difference']:.1g}. From the first third "
        f"of that job to its last, memory of the larger rank changed by "
        f"{grown['memory_mib']:+.1%}, threads by {grown['threads']:+.1%} "
        f"and open files by {grown['files']:+.1%}."
    )
    return textwrap.fill(text, 110)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    parser.add_argument("--no-page", action="store_true", help="print the outcome only")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    random.seed(seed)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        calm, wild = Path(name) / "calm", Path(name) / "wild"
        calm.mkdir()
        wild.mkdir()
        used = undisturbed(calm, options.iterations)
        killed_after = disturbed(wild, options.iterations, options.kills)
        expected, resumed = losses(calm), losses(wild)
    if expected.keys() != resumed.keys() or len(expected) != options.iterations:
        sys.exit(f"{len(expected)} iterations undisturbed, {len(resumed)} with kills")
    found = {
        "seed": seed,
        "iterations": options.iterations,
        "killed_after": killed_after,
        "difference": max(abs(resumed[i] / expected[i] - 1) for i in expected),
        "first_loss": expected[1],
        "last_loss": expected[options.iterations],
        "median": {kind: statistics.median(values) for kind, values in used.items()},
        "growth": {kind: round(growth(values), 5) for kind, values in used.items()},
    }
    print(json.dumps(found))
    if not options.no_page:
        RESULTS.write_text(json.dumps({**setting(device=device_name()), **found}, indent=1) + "\n")
        write_section("soak", page(found))
    grown = [kind for kind, most in MOST_GROWTH.items() if found["growth"][kind] > most]
    if grown or found["difference"] > TOLERANCE:
        sys.exit(f"grown: {grown}; difference of losses: {found['difference']}")


if __name__ == "__main__":
    main()
