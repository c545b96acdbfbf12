"""``python -m tests.fuzz --cases N --seed S``: damage what the tools read, and watch them.

Each case has to end with a right result, or with a clear error: no traceback, no hang, no program
started, no file written outside of the case's folder. A case that does not is printed with what
repeats it, and the exit status is 1.
"""

import argparse
import collections
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

KINDS = (
    *("hf-to-megatron", "megatron-to-hf", "preprocess", "indexed"),
    *("trace", "exp-logs", "environment"),
)
_LATE = 90.0
_MOST_BYTES = 6 << 30

Counts = dict[str, collections.Counter[str]]
"""By kind, how many cases ended with a result, an error or a fault."""


def targets(base: Path) -> dict[str, Callable[[Path], Any]]:
    """Return what makes each kind's target, which prepares what its cases damage."""
    from tests.fuzz.checkpoints import HfToMegatron, MegatronToHf
    from tests.fuzz.command_lines import Environment, ExpLogs, Trace
    from tests.fuzz.data import Indexed, Preprocess

    kinds = (HfToMegatron, MegatronToHf, Preprocess, Indexed, Trace, ExpLogs, Environment)
    return dict(zip(KINDS, kinds, strict=True))


def kind_of(seed: int, number: int, kinds: tuple[str, ...]) -> str:
    """Return which kind a case is of."""
    return random.Random(f"{seed}:{number}:kind").choice(kinds)


def one_case(target: Any, seed: int, number: int, scratch: Path) -> tuple[str, str]:
    """Run a case; returns how it ended, result, error or fault, and what it did wrong."""
    from tests.fuzz.watch import Fault, watched

    folder = scratch / f"case{number}"
    folder.mkdir()
    try:
        with watched(folder):
            has_result = target.run(random.Random(f"{seed}:{number}"), folder)
    except Fault as error:
        return "fault", str(error)
    except BaseException:
        return "fault", f"a traceback outside of the tool:\n{traceback.format_exc()}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ("result" if has_result else "error"), ""


def work(args: argparse.Namespace, numbers: list[int], scratch: Path, pipe: int) -> None:
    """Run cases in this process, telling each start and end through ``pipe``."""
    from tests.fuzz.watch import WATCH

    def tell(*words: Any) -> None:
        os.write(pipe, (json.dumps(words) + "\n").encode())

    base = scratch / "base"
    made: dict[str, Any] = {}
    makers = targets(base)
    WATCH.install((scratch / "home", Path("/dev")))
    for number in numbers:
        kind = kind_of(args.seed, number, args.kinds)
        if kind not in made:
            (base / kind).mkdir(parents=True, exist_ok=True)
            tell("prepares", number, kind)
            made[kind] = makers[kind](base / kind)
        tell("starts", number, kind)
        tell("ends", number, kind, *one_case(made[kind], args.seed, number, scratch))


def supervise(args: argparse.Namespace) -> dict[str, Any]:
    """Run all cases in a child process; one that hangs or dies is a fault, and others follow."""
    faults: list[dict[str, Any]] = []
    counts: Counts = collections.defaultdict(collections.Counter)
    left = list(range(args.first, args.first + args.cases))
    started = time.monotonic()
    while left:
        with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
            for fault in _child(args, left, Path(folder), counts):
                faults.append(fault)
                print(f"\nfault: {fault['kind']}, case {fault['case']}\n{fault['fault']}")
                print(f"repeat: python -m tests.fuzz --seed {args.seed} --first {fault['case']} "
                      f"--cases 1 --kinds {' '.join(args.kinds)}", flush=True)  # fmt: skip
    return {
        "seed": args.seed,
        "cases": args.cases,
        "by_kind": {kind: dict(sorted(counts[kind].items())) for kind in sorted(counts)},
        "faults": faults,
        "seconds": round(time.monotonic() - started, 1),
        "date": date.today().isoformat(),
    }


def _child(args: argparse.Namespace, left: list[int], scratch: Path, counts: Counts) -> Any:
    """Run the cases in ``left`` in a new process, and take out of it what is done."""
    (scratch / "home").mkdir()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        os.environ["HOME"] = os.environ["TMPDIR"] = str(scratch / "home")
        tempfile.tempdir = None
        os.chdir(scratch / "home")
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
        try:
            work(args, left, scratch, writing)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    os.close(writing)
    running: tuple[int, str] | None = None
    buffer = b""
    while True:
        ready, _, _ = select.select([reading], [], [], _LATE)
        data = os.read(reading, 1 << 16) if ready else b""
        if not data:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            os.close(reading)
            if running is not None:
                fault = "hangs" if not ready else f"the process died: status {status}"
                left.remove(running[0])
                counts[running[1]]["fault"] += 1
                yield {"case": running[0], "kind": running[1], "fault": fault}
            elif left:
                raise SystemExit("tests.fuzz: the child process ended between cases")
            return
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            word, number, kind, *ending = json.loads(line)
            running = (number, kind) if word in ("prepares", "starts") else None
            if word == "ends":
                left.remove(number)
                counts[kind][ending[0]] += 1
                if args.progress and len(left) % 500 == 0:
                    print(f"{len(left)} cases left", flush=True)
                if ending[0] == "fault":
                    yield {"case": number, "kind": kind, "fault": ending[1]}


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="default: another each time")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, help="JSON file for the outcome")
    parser.add_argument("--progress", action="store_true", help="print how many are left")
    args = parser.parse_args()
    args.kinds = tuple(args.kinds)
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {args.seed}", flush=True)
    outcome = supervise(args)
    if args.output is not None:
        args.output.write_text(json.dumps(outcome, indent=2) + "\n")
    print(json.dumps({key: value for key, value in outcome.items() if key != "faults"}))
    print(f"{len(outcome['faults'])} faults")
    return int(bool(outcome["faults"]))


if __name__ == "__main__":
    sys.exit(main())
