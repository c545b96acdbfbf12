#!/usr/bin/env python
"""What tools/preprocess_data.py costs over the tokenizer that it calls, on one file, in one run.

    python benchmarks/preprocess.py

Makes a corpus of about 32 MB of Python source with a vocabulary of 8192 (tools/make_corpus.py), and
runs in turn, each in a process of its own:

- the tool, GPT2BPETokenizer, `--append-eod`;
- the bare loop: read the same file, parse its JSON, `encode_batch_fast`, keep nothing.

Medians over the repeats go to benchmarks/results/preprocess.json. Start-up is all of the tool's
wall time but its loop: interpreter, imports, tokenizer, publishing, exit. The processor seconds of
the two whole processes stand beside the wall times: they tell the same on a busy machine.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/preprocess.json"
MAX_START_UP_SECONDS = 3.0
MAX_RATIO = 1.25

BARE_LOOP = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from seq1f1b_tools.preprocessing.bpe import load_gpt2_bpe
tokenizer = load_gpt2_bpe(sys.argv[3], sys.argv[4])
start = time.perf_counter()
batch = []
with open(sys.argv[2], encoding="utf-8") as lines:
    for line in lines:
        batch.append(json.loads(line)["content"])
        if len(batch) == 128:
            tokenizer.encode_batch_fast(batch)
            batch = []
tokenizer.encode_batch_fast(batch)
print(time.perf_counter() - start)
"""


def main() -> int:
    """Measure, print and store; the exit code is 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="threads, of both")
    args = parser.parse_args()
    threads = {"RAYON_NUM_THREADS": str(args.workers), "TOKENIZERS_PARALLELISM": "true"}
    environment = os.environ | threads
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        make = [sys.executable, ROOT / "tools/make_corpus.py", "--output-dir", data]
        subprocess.run(make, check=True)
        runs = []
        for _ in range(args.repeats):
            before = processor_seconds()
            start_up, loop = time_tool(data, args.workers)
            between = processor_seconds()
            bare = time_bare_loop(data, environment)
            runs.append(
                {
                    "start_up_seconds": start_up,
                    "tool_seconds": loop,
                    "bare_seconds": bare,
                    "tool_processor_seconds": between - before,
                    "bare_processor_seconds": processor_seconds() - between,
                }
            )
            print(json.dumps(runs[-1]), flush=True)
        result = summary(runs, (data / "corpus.jsonl").stat().st_size, args.workers)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    kept = (
        result["median"]["start_up_seconds"] < MAX_START_UP_SECONDS
        and result["ratio_to_bare"] <= MAX_RATIO
    )
    return 0 if kept else 1


def processor_seconds() -> float:
    """Of all the processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def time_tool(data: Path, num_workers: int) -> tuple[float, float]:
    """Seconds outside and inside the tool's loop."""
    command = [
        *(sys.executable, ROOT / "tools/preprocess_data.py", "--input", data / "corpus.jsonl"),
        *("--json-keys", "content", "--output-prefix", data / "out", "--append-eod"),
        *("--tokenizer-type", "GPT2BPETokenizer", "--workers", str(num_workers)),
        *("--vocab-file", data / "tokenizer/vocab.json"),
        *("--merge-file", data / "tokenizer/merges.txt"),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    wall = time.perf_counter() - start
    loop = float(re.search(r"MB in ([\d.]+) s", done.stderr)[1])
    return wall - loop, loop


def time_bare_loop(data: Path, environment: dict[str, str]) -> float:
    """Seconds of the loop alone, without the start of its process."""
    files = [data / "corpus.jsonl", data / "tokenizer/vocab.json", data / "tokenizer/merges.txt"]
    command = [sys.executable, "-c", BARE_LOOP, ROOT, *files]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout)


def summary(runs: list[dict[str, float]], num_bytes: int, num_workers: int) -> dict:
    """Medians, with what they were measured on."""
    median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    packages = ("tokenizers", "numpy", "rich")
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "workers": num_workers,
        "file_megabytes": num_bytes / 1e6,
        "load_average": os.getloadavg()[0],
        "median": median,
        "ratio_to_bare": statistics.median(r["tool_seconds"] / r["bare_seconds"] for r in runs),
        "bounds": {"start_up_seconds": MAX_START_UP_SECONDS, "ratio_to_bare": MAX_RATIO},
        "runs": runs,
    }


if __name__ == "__main__":
    sys.exit(main())
