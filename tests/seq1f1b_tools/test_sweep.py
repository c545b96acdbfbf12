"""The sweep on a training script that writes figures, fails, or runs out of memory as told."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from seq1f1b_tools.sweep.corpus import Corpus, CorpusError, prepare
from seq1f1b_tools.sweep.launch import explain
from seq1f1b_tools.sweep.main import main, sweep_and_report
from seq1f1b_tools.sweep.nodes import Nodes, NodesError
from seq1f1b_tools.sweep.pinned import own_cores
from seq1f1b_tools.sweep.plan import plan_runs, why_not
from seq1f1b_tools.sweep.records import largest_loss_difference, read_metrics, speedup, summarize
from seq1f1b_tools.sweep.settings import (
    ROOT,
    VARIABLES,
    Settings,
    SettingsError,
    help_text,
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
if behaviour == "fails":
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


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


# --------------------------------------------------------------------------------- whole sweeps


def test_sweep_compares_every_schedule_with_1f1b(bench):
    assert bench.sweep() == 0
    assert bench.calls() == [BASELINE, AVERAGE, UNIFORM]
    rows = bench.rows()
    assert list(rows) == [BASELINE, AVERAGE, UNIFORM]
    baseline, uniform = rows[BASELINE], rows[UNIFORM]
    assert {row["status"] for row in rows.values()} == {"ok"}
    # the first two iterations take 5 s: the median leaves them out
    assert float(baseline["ms_per_iteration"]) == 1000
    assert float(uniform["ms_per_iteration"]) == 250
    assert float(uniform["speedup"]) == 4
    assert float(uniform["speedup_theory"]) == pytest.approx(4 / 3, abs=1e-4)
    assert uniform["peak_memory_mib"] == "50.00 25.00"
    assert float(baseline["bubble_ratio"]) == pytest.approx(0.2)
    assert float(baseline["bubble_ratio_theory"]) == pytest.approx(1 / 3, abs=1e-4)
    assert float(uniform["last_loss"]) == pytest.approx(7.6, abs=1e-5)
    assert float(uniform["max_loss_difference"]) == pytest.approx(1e-6 / 7.6, rel=1e-2)
    assert (uniform["schedule"], uniform["s"], uniform["balance"]) == (
        "seq1f1b",
        "4",
        "uniform_comp",
    )
    assert "4.000 (1.333)" in bench.text
    for chart in ("throughput.png", "memory.png"):
        assert (bench.output / chart).read_bytes().startswith(b"\x89PNG")
    log = (bench.output / "logs" / f"{UNIFORM}.log").read_text()
    assert log.startswith("$ ")
    assert "--seq1f1b-balance-method uniform_comp" in log


def test_failed_and_out_of_memory_runs_are_recorded_and_the_sweep_goes_on(bench):
    bench.behave(baseline="oom", average="fails")
    assert bench.sweep() == 1
    rows = bench.rows()
    assert rows[BASELINE]["status"] == "oom"
    assert "can't allocate memory" in rows[BASELINE]["error"]
    assert rows[AVERAGE]["status"] == "failed"
    assert rows[AVERAGE]["error"] == "ValueError: the loss went through the roof"
    assert rows[UNIFORM]["status"] == "ok"
    assert rows[UNIFORM]["speedup"] == ""
    assert "the loss went through the roof" in bench.text
    assert (bench.output / "memory.png").exists()


def test_out_of_memory_alone_is_a_result_and_no_failure(bench):
    bench.behave(baseline="oom")
    assert bench.sweep() == 0


def test_second_sweep_repeats_nothing_and_reports_the_same(bench):
    bench.sweep()
    first = bench.rows()
    bench.calls()
    assert bench.sweep() == 0
    assert bench.calls() == []
    assert bench.rows() == first


def test_failed_runs_are_repeated_only_on_request(bench):
    bench.behave(average="fails")
    bench.sweep()
    bench.calls()
    bench.behave()
    assert bench.sweep() == 1
    assert bench.calls() == []
    assert bench.sweep(RETRY_FAILED="1") == 0
    assert bench.calls() == [AVERAGE]
    assert bench.rows()[AVERAGE]["status"] == "ok"


def test_a_machine_that_slows_down_does_not_change_the_speedup():
    # Side by side, one is faster by 1.25 but where the machine changed; the medians say 0.625.
    baseline, run = (10.0, 10.0, 10.0, 20.0, 20.0), (8.0, 8.0, 16.0, 16.0, 16.0)
    assert speedup(run, baseline) == 1.25
    assert speedup(baseline, baseline) == 1


def test_other_flags_make_another_run(bench):
    bench.sweep()
    bench.calls()
    assert bench.sweep(EXTRA_ARGS="--swiglu") == 0
    assert len(bench.calls()) == 3


def test_wider_sweep_keeps_what_is_done(bench):
    bench.sweep()
    bench.calls()
    bench.sweep(SPLITS="1 2 4", BALANCE_METHODS="average")
    assert bench.calls() == [AVERAGE.replace("s4", "s2")]
    assert float(bench.rows()[AVERAGE.replace("s4", "s2")]["speedup"]) == 2


def test_run_without_all_its_iterations_has_failed(bench):
    bench.behave(uniform="stops early")
    assert bench.sweep() == 1
    assert bench.rows()[UNIFORM]["status"] == "failed"
    assert "only 3 of 4 iterations" in bench.rows()[UNIFORM]["error"]


def test_run_that_hangs_is_ended(bench):
    bench.behave(average="hangs")
    assert bench.sweep(RUN_TIMEOUT="1.5") == 1
    assert bench.rows()[AVERAGE]["status"] == "timeout"
    assert bench.rows()[AVERAGE]["error"] == "ended after 1.5 seconds (RUN_TIMEOUT)"
    assert bench.rows()[UNIFORM]["status"] == "ok"


def test_runs_that_make_no_sense_are_skipped_with_the_reason(bench):
    assert bench.sweep(SPLITS="1 100", PP="2 3", BALANCE_METHODS="average") == 0
    rows = bench.rows()
    assert bench.calls() == [BASELINE]
    assert {name: row["status"] for name, row in rows.items() if row["status"] != "ok"} == {
        name: "skipped" for name in rows if name != BASELINE
    }
    too_many = rows["tiny-seq64-tp1-pp2-m2-seq1f1b-s100-average"]["error"]
    assert "100" in too_many
    assert "64" in too_many
    assert "PP 3" in rows["tiny-seq64-tp1-pp3-m2-1f1b"]["error"]


def test_folder_that_another_sweep_writes_to_is_refused(bench, capsys):
    settings = bench.settings()
    first = Sweep(settings, Nodes(settings.cluster), Console(file=io.StringIO()))
    first.output.claim()
    assert main([], bench.environ(), num_gpus=0) == 1
    assert "another sweep is writing there" in capsys.readouterr().err


def test_folder_that_cannot_be_written_to_is_refused(bench, capsys):
    bench.output.touch()
    assert main([], bench.environ(), num_gpus=0) == 1
    assert f"OUTPUT={bench.output}: cannot be written to" in capsys.readouterr().err


def test_arguments_are_refused(capsys):
    assert main(["--splits", "4"], {}, num_gpus=0) == 2
    assert "takes no arguments (--splits 4)" in capsys.readouterr().err


# --------------------------------------------------------- sweeps in processes of their own

DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import os
from rich.console import Console
from seq1f1b_tools.sweep import main as entry
from seq1f1b_tools.sweep.sweep import Sweep
from tests.seq1f1b_tools.test_sweep import make_no_data

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


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_run_and_reports_what_is_done(bench, number):
    bench.behave(average="hangs")
    process = start(bench)
    running = bench.output / "metrics" / f"{AVERAGE}.jsonl"
    wait_for(running.exists)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "the same command goes on from here" in text
    assert "Traceback" not in text
    rows = bench.rows()
    assert [row["status"] for row in rows.values()] == ["ok", "not run", "not run"]
    bench.calls()
    bench.behave()
    assert bench.sweep() == 0
    assert bench.calls() == [AVERAGE, UNIFORM]


@pytest.mark.distributed
def test_torchrun_starts_a_process_per_rank_on_its_own_core(bench):
    bench.script.write_text(
        FAKE_SCRIPT
        + "import os\n"
        + "cores = sorted(os.sched_getaffinity(0))\n"
        + "rank = os.environ['RANK']\n"
        + "(folder / f'rank{rank}').write_text(json.dumps([cores, os.environ]"
        + ", default=dict))\n"
    )
    process = start(bench, "torchrun", SPLITS="1", PP="2", TRAIN_ITERS="3")
    text, _ = process.communicate(timeout=110)
    assert process.returncode == 0, text
    (first, environ), (second, _) = (
        json.loads((bench.folder / f"rank{rank}").read_text()) for rank in (0, 1)
    )
    assert environ["OMP_NUM_THREADS"] == "1"
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(first) & set(second)


def free_ports() -> str:
    """A port that is free, and hopefully the one after it too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(min(probe.getsockname()[1], 65000))


def start_nodes(bench: Bench, *variables: dict[str, str]) -> list[tuple[int, str]]:
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports()}
    processes = [
        start(bench, **{**common, "NODE_RANK": str(rank), **own})
        for rank, own in enumerate(variables)
    ]
    texts = [process.communicate(timeout=110)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.distributed
def test_nodes_agree_on_runs_and_only_the_first_reports(bench):
    bench.behave(average="fails")
    (status, text), (other_status, other_text) = start_nodes(bench, {}, {})
    assert status == 1, text
    assert other_status == 1, other_text
    assert "results.csv" in text
    assert "results.csv" not in other_text
    assert sorted(bench.calls()) == sorted([BASELINE, AVERAGE, UNIFORM] * 2)
    assert bench.rows()[AVERAGE]["error"] == "ValueError: the loss went through the roof"
    start_nodes(bench, {}, {})
    assert bench.calls() == []


@pytest.mark.distributed
def test_nodes_with_other_settings_are_refused(bench):
    (first_status, text), (status, other_text) = start_nodes(bench, {}, {"TRAIN_ITERS": "5"})
    assert first_status == status == 1
    assert "node 1: this node's settings are not node 0's" in text
    assert "this node's settings are not node 0's" in other_text


@pytest.mark.distributed
def test_nodes_without_a_shared_folder_are_refused(bench, tmp_path):
    elsewhere = {"OUTPUT": str(tmp_path / "elsewhere")}
    _, (status, text) = start_nodes(bench, {}, elsewhere)
    assert status == 1
    assert "put DATA and OUTPUT on a file system that all nodes share" in text


@pytest.mark.distributed
def test_node_that_waits_in_vain_says_for_whom(bench):
    settings = bench.settings(NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_ports())
    with pytest.raises(NodesError, match="NNODES=2: only 1 came within 1 s"):
        Nodes(settings.cluster, seconds_to_meet=1)


def test_runs_that_are_compared_take_turns(bench):
    bench.script.write_text(
        FAKE_SCRIPT.replace(
            "for iteration in range(1, num_iterations + 1):",
            "import os\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            "from seq1f1b_tools.sweep.turns.rank import Turn\n"
            "turn = Turn(os.environ)\n"
            "for iteration in range(1, num_iterations + 1):\n"
            "    turn.wait()\n"
            "    with (folder / 'steps').open('a') as steps:\n"
            "        steps.write(f'{name} {iteration} ')\n",
        )
    )
    assert bench.sweep(TAKE_TURNS="1") == 0, bench.text
    steps = (bench.folder / "steps").read_text().split()
    assert steps == [
        word for i in "1234" for run in (BASELINE, AVERAGE, UNIFORM) for word in (run, i)
    ]
    assert {row["status"] for row in bench.rows().values()} == {"ok"}
    (bench.folder / "steps").unlink()
    bench.behave(average="oom", baseline="stops early")
    assert bench.sweep(TAKE_TURNS="1", TRAIN_ITERS="5") == 1
    rows = bench.rows()
    assert [rows[name]["status"] for name in (BASELINE, AVERAGE, UNIFORM)] == [
        "failed",
        "oom",
        "ok",
    ]


def test_an_interrupt_ends_every_run_that_takes_turns(bench):
    bench.behave(average="hangs", uniform="hangs")
    process = start(bench, TAKE_TURNS="1")
    wait_for((bench.output / "metrics" / f"{AVERAGE}.jsonl").exists)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert [row["status"] for row in bench.rows().values()] == ["not run"] * 3


# -------------------------------------------------------------------------------------- settings


def faults(environ: dict[str, str], num_gpus: int = 0) -> str:
    with pytest.raises(SettingsError) as caught:
        read_settings(environ, num_gpus)
    return str(caught.value)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("MODEL_SIZES", "tiny 8b", "'8b' is not one of tiny, tiny-deep, 1.3b, 2.7b, 7b, 13b, 30b"),
        ("SEQ_LENGTHS", "4k", "'4k' is not a whole number from 1 up"),
        ("MICRO_BATCHES", "0", "'0' is not a whole number from 1 up"),
        ("SPLITS", "-1", "'-1' is not a whole number from 1 up"),
        ("SPLITS", ",", "there is no value in it"),
        ("BALANCE_METHODS", "even", "'even' is not one of average, uniform_comp"),
        ("MULTIPLE", "0", "'0' is not a whole number from 1 up"),
        ("VPP_SIZES", "1.5", "'1.5' is not a whole number from 1 up"),
        ("TP", "two", "'two' is not a whole number from 1 up"),
        ("PP", "0", "'0' is not a whole number from 1 up"),
        ("TRAIN_ITERS", "1 2 3", "give one number, or 2 of them, one for each of MICRO_BATCHES"),
        ("WARMUP_ITERS", "12", r"must be below TRAIN_ITERS (12)"),
        ("DATASET", "c4", "'c4' is not one of stdlib, codeparrot"),
        ("VOCAB_SIZE", "100", "'100' is not a whole number from 257 up"),
        ("CORPUS_MB", "inf", "'inf' is not a number above 0"),
        ("EXTRA_ARGS", "--a 'b", "cannot be split into words: No closing quotation"),
        ("RUN_TIMEOUT", "-3", "'-3' is not a number above 0"),
        ("RETRY_FAILED", "yes", "'yes' is not one of 0, 1"),
        ("TAKE_TURNS", "no", "'no' is not one of 0, 1"),
        ("NNODES", "0", "'0' is not a whole number from 1 up"),
        ("MASTER_PORT", "80", "'80' is not a port from 1024 to 65534"),
    ],
)
def test_bad_values_are_named(name, value, message):
    text = faults({name: value})
    assert text.startswith(f"{name}={value}: ") or name == "TRAIN_ITERS"
    assert message in text


def test_all_bad_values_are_listed_at_once_before_anything_runs(bench, capsys):
    environ = bench.environ(SPLITS="0", TP="x", NNODES="2", NODE_RANK="2", TAKE_TURNS="1")
    assert main([], environ, num_gpus=0) == 2
    text = capsys.readouterr().err
    for name in ("SPLITS=0", "TP=x", "NODE_RANK=2", "MASTER_ADDR: must be set", "TAKE_TURNS=1: "):
        assert name in text
    assert not bench.output.exists()


def test_more_gpus_than_there_are_is_refused():
    assert "GPUS_PER_NODE=8: this node has 4" in faults({"GPUS_PER_NODE": "8"}, num_gpus=4)


@pytest.mark.parametrize("num_gpus,pp", [(8, 8), (16, 8), (6, 2), (4, 4), (1, 1)])
def test_gpu_defaults_fit_the_gpus(num_gpus, pp):
    settings = read_settings({}, num_gpus)
    assert settings.model_sizes == ("2.7b",)
    assert settings.pp == (pp,)
    runs = plan_runs(settings)
    assert not [reason for run in runs if (reason := why_not(run, settings))]
    assert {run.num_processes for run in runs} == {num_gpus}
    assert runs[0].global_batch_size == runs[0].num_micro_batches * num_gpus // pp


def test_help_lists_every_variable_with_its_defaults():
    lines = help_text().splitlines()
    for variable in VARIABLES:
        line = next(line for line in lines if line.startswith(f"{variable.name} "))
        assert variable.cpu in line
        assert variable.gpu in line


def test_help_needs_nothing_installed():
    command = [sys.executable, "-I", "-S", str(ROOT / "seq1f1b_tools" / "sweep"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "MODEL_SIZES" in done.stdout


def slurm(tmp_path: Path, **variables: str) -> dict[str, str]:
    return {"SLURM_NNODES": "3", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[4-6]", **variables}


def test_slurm_is_read(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "gpu[4-6]" ] && printf "gpu4\\ngpu5\\ngpu6\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = read_settings(slurm(tmp_path), num_gpus=8).cluster
    assert (cluster.num_nodes, cluster.node_rank, cluster.master_addr) == (3, 1, "gpu4")
    chosen = read_settings(slurm(tmp_path, MASTER_ADDR="10.0.0.1"), num_gpus=8).cluster
    assert chosen.master_addr == "10.0.0.1"
    assert read_settings(slurm(tmp_path, NNODES="1"), num_gpus=8).cluster.num_nodes == 1
    assert "SLURM_LOCALID=1" in faults(slurm(tmp_path, SLURM_LOCALID="1"))
    assert "scontrol cannot expand it" in faults(slurm(tmp_path, SLURM_JOB_NODELIST="x"))


def test_slurm_without_scontrol_asks_for_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "scontrol, which expands it, is not on the PATH" in faults(slurm(tmp_path))


# ------------------------------------------------------------------------------------------ plan


def reasons(num_gpus: int = 0, **variables: str) -> dict[str, str]:
    settings = read_settings(variables, num_gpus)
    return {run.variant: why_not(run, settings) for run in plan_runs(settings)}


@pytest.mark.parametrize(
    "num_gpus,variables,reason",
    [
        (0, {"PP": "3"}, "2 layers cannot be dealt to PP 3 x VPP 1 evenly"),
        (0, {"TP": "3"}, "4 attention heads are not divisible by TP 3"),
        (0, {"PP": "1", "VPP_SIZES": "2"}, "VPP 2 needs PP 2 or more"),
        (0, {"NNODES": "4", "MASTER_ADDR": "a"}, "2 processes cannot be dealt to 4 nodes evenly"),
        (8, {"PP": "3"}, "TP 1 x PP 3 does not divide 8 processes"),
    ],
)
def test_impossible_parallelism_is_skipped(num_gpus, variables, reason):
    assert set(reasons(num_gpus, MICRO_BATCHES="2", **variables).values()) == {reason}


@pytest.mark.parametrize("variables,multiple", [({}, 1), ({"MULTIPLE": "64"}, 64)])
def test_lengths_are_cut_in_the_blocks_that_were_asked_for(variables, multiple):
    runs = plan_runs(read_settings(variables, num_gpus=0))
    found = {run.num_splits > 1: run.multiple for run in runs}
    assert found == {False: 1, True: multiple}


def test_blocks_that_do_not_fit_are_skipped():
    found = reasons(MULTIPLE="3000", MICRO_BATCHES="2")
    assert found.pop("1f1b") == ""
    for reason in found.values():
        assert reason.startswith("sequence length 4096 is not a multiple of 3000")


def test_megatrons_interleaved_loop_needs_whole_rounds_of_micro_batches():
    found = reasons(MODEL_SIZES="tiny-deep", MICRO_BATCHES="3", VPP_SIZES="1 2")
    assert found["1f1b"] == ""
    assert "multiples of PP 2" in found["1f1b-interleaved-v2"]


def test_every_baseline_comes_before_what_is_compared_with_it():
    settings = read_settings({"SPLITS": "4 2 1", "VPP_SIZES": "2 1"}, num_gpus=0)
    runs = plan_runs(settings)
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 5
    seen = set()
    for run in runs:
        assert run.is_baseline or run.setting in seen
        seen.add(run.setting)


# ----------------------------------------------------------------------- what is read from files


def test_reasons_of_failures_are_found_in_logs(tmp_path):
    def of(text: str, status: int = 1) -> tuple[str, str]:
        log = tmp_path / "log"
        log.write_text(text)
        return explain(log, status)

    cuda = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert of(f"...\n[rank3]: {cuda}\nChildFailedError: x\n") == ("oom", cuda)
    assert of("[rank1]: ValueError: bad\n[rank0]: RuntimeError: Connection closed by peer\n") == (
        "failed",
        "ValueError: bad",
    )
    listed = (
        "megatron.adaptor.settings.SettingsError: cannot run:\n  - --a is bad\n  - --b is bad\n"
    )
    assert of(listed)[1].endswith("cannot run: - --a is bad - --b is bad")
    assert of("pretrain_gpt.py: error: unrecognized arguments: --x\nusage\n")[1] == (
        "pretrain_gpt.py: error: unrecognized arguments: --x"
    )
    assert of("  exitcode  : -9 (pid: 12)\n")[0] == "oom"
    assert of("starting\n", -9)[0] == "oom"
    assert of("starting\n\n", 3) == ("failed", "starting")
    assert of("", 3) == ("failed", "ended with status 3 and no message")


def test_line_that_is_being_written_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"iteration": 1}\n{"itera')
    assert read_metrics(file) == [{"iteration": 1}]


def test_summary_of_nothing_but_warm_up_is_none():
    assert summarize([{"iteration": 1}], 1) is None


def test_loss_differences():
    assert largest_loss_difference([2.0, 1.0], [2.0, 1.1]) == pytest.approx(0.1 / 1.1)
    assert largest_loss_difference([float("nan")], [2.0]) == float("inf")
    assert largest_loss_difference([None], [2.0]) is None


def test_cores_are_dealt_to_ranks():
    assert [own_cores([2, 3, 6, 7], rank, 2) for rank in (0, 1)] == [[2, 3], [6, 7]]
    assert [own_cores([0, 1, 2], rank, 2) for rank in (0, 1)] == [[0], [1, 2]]
    assert own_cores([0, 1], 2, 4) == [0, 1]


# ------------------------------------------------------------------------------------------ data


def test_data_is_made_by_the_tools_and_not_made_twice(bench):
    settings = bench.settings()
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        if "preprocess_data.py" in command[1]:
            make_no_data(settings)
        return 0

    corpus = prepare(settings, run)
    assert [Path(command[1]).name for command in commands] == [
        "make_corpus.py",
        "preprocess_data.py",
    ]
    assert str(corpus.documents) in commands[1]
    prepare(settings, run)
    assert len(commands) == 3
    os.utime(corpus.documents, (time.time() + 9, time.time() + 9))
    prepare(settings, run)
    assert Path(commands[-1][1]).name == "preprocess_data.py"


def test_tool_that_fails_ends_the_sweep(bench):
    with pytest.raises(CorpusError, match=r"tools/make_corpus.py ended with status 2"):
        prepare(bench.settings(), lambda command: 2)
