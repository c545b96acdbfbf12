"""How tools/preprocess_data.py ends when something ends it, and what it does without a network."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import wait_for
from tests.seq1f1b_tools.preprocess_runs import ROWS, TOOLS, command, pair, run, write_jsonl

pytestmark = pytest.mark.usefixtures("thread_settings")


@pytest.fixture(scope="module")
def long_input(tmp_path_factory):
    """Some seconds of work."""
    path = tmp_path_factory.mktemp("long") / "in.jsonl"
    with open(path, "w") as file:
        for start in range(0, 3_000_000, 100):
            text = " ".join(f"Name{number} is here." for number in range(start, start + 100))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def start(*flags, **options):
    """Start the tool with the signals that a terminal's programs have."""
    return subprocess.Popen(
        command(*flags),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing(tmp_path, gpt2_flags, long_input, number):
    out = tmp_path / "out"
    flags = ["--input", long_input, "--output-prefix", out / "x", "--chunk-size", 100]
    process = start(*flags, *gpt2_flags, "--workers", 1)
    wait_for(lambda: any(path.stat().st_size > 0 for path in out.glob("*.tmp")))
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: ended, nothing was written" in message
    assert "Traceback" not in message
    assert list(out.iterdir()) == []


def test_an_interrupted_run_keeps_the_pair_that_was_there(tmp_path, gpt2_flags, long_input):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "short"}])
    out = tmp_path / "out"
    flags = ["--output-prefix", out / "x", *gpt2_flags]
    assert run("--input", source, *flags) == 0
    before = pair(out / "x_text_document")
    process = start("--input", long_input, *flags, "--workers", 1, "--chunk-size", 100)
    wait_for(lambda: any(path.stat().st_size > 0 for path in out.glob("*.tmp")))
    process.terminate()
    process.communicate(timeout=60)
    assert pair(out / "x_text_document") == before
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize("victim", ["worker", "run"])
def test_processes_end_with_the_run(tmp_path, gpt2_flags, long_input, victim):
    model = tmp_path / "nltk/tokenizers/punkt_tab/english"
    model.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (model / name).write_text("")
    out = tmp_path / "out"
    process = start(
        "--input", long_input, "--output-prefix", out / "x", "--split-sentences", "--workers", 2,
        "--chunk-size", 20, *gpt2_flags, env=os.environ | {"NLTK_DATA": str(tmp_path / "nltk")},
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: any(path.stat().st_size > 0 for path in out.glob("*.tmp")))
    workers = [int(pid) for pid in children.read_text().split()]
    assert len(workers) == 2
    if victim == "worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        process.terminate()
    _, message = process.communicate(timeout=60)
    if victim == "worker":
        assert process.returncode == 1
        assert "a worker process ended unexpectedly by signal SIGKILL" in message
    else:
        assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in message
    assert list(out.iterdir()) == []
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def test_a_disk_that_is_full(tmp_path, gpt2_flags, long_input):
    done = subprocess.run(
        command("--input", long_input, "--output-prefix", tmp_path / "out/x", *gpt2_flags),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "--output-prefix" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs): raise OSError("network is off limits")
socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, {tools!r})
import preprocess_data
code = preprocess_data.main({flags!r})
print([name for name in ("torch", "megatron.core") if name in sys.modules])
sys.exit(code)
"""


@pytest.mark.parametrize("kind", ["GPT2BPETokenizer", "HuggingFaceTokenizer"])
def test_offline_and_without_heavy_imports(tmp_path, gpt2_flags, tokenizer_folder, kind):
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    model = ["--tokenizer-type", kind, "--tokenizer-model", str(tokenizer_folder)]
    flags = ["--input", str(source), "--json-keys", "content", *gpt2_flags[2:], *model]
    flags += ["--output-prefix", str(tmp_path / "x")]
    code = NO_NETWORK.format(tools=str(TOOLS), flags=flags)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.strip() == "[]"


def test_punkt_model_that_is_missing(tmp_path, gpt2_flags):
    source = write_jsonl(tmp_path / "in.jsonl", ROWS)
    flags = ["--input", str(source), "--split-sentences", *gpt2_flags]
    flags += ["--output-prefix", str(tmp_path / "out/x")]
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK.format(tools=str(TOOLS), flags=flags)],
        env=os.environ | {"NLTK_DATA": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--split-sentences: nltk has no Punkt model" in done.stderr
    assert "python -m nltk.downloader punkt_tab" in done.stderr
