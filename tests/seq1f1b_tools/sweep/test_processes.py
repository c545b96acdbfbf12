"""Sweeps in processes of their own: interrupts, kills, torchrun, and several nodes."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from seq1f1b_tools.sweep.main import main
from seq1f1b_tools.sweep.nodes import Nodes, NodesError
from seq1f1b_tools.sweep.records import (
    Output,
    read_metrics,
)
from tests.processes import is_alive, wait_for
from tests.selection import mostly_long
from tests.seq1f1b_tools.sweep.bench import (
    AVERAGE,
    BASELINE,
    FAKE_SCRIPT,
    UNIFORM,
    Bench,
    report_pids,
    start,
)


@pytest.mark.parametrize(
    "number",
    mostly_long([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], default=[signal.SIGTERM]),
)
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


# Put before the fake script, which stands for all stages: one rank writes figures.
RECORD_CORES = """
import json, os
from pathlib import Path
cores, rank = sorted(os.sched_getaffinity(0)), os.environ["RANK"]
(Path(__file__).parent / f"rank{rank}").write_text(json.dumps([cores, dict(os.environ)]))
if rank != "0":
    raise SystemExit
"""


@pytest.mark.distributed
def test_torchrun_starts_a_process_per_rank_on_its_own_core(bench):
    bench.script.write_text(RECORD_CORES + FAKE_SCRIPT)
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
    bench.behave(average="fails on both nodes")
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


def test_a_killed_sweep_leaves_nothing_that_trains(bench):
    pids = report_pids(bench)
    bench.behave(average="hangs")
    process = start(bench)
    wait_for((bench.output / "metrics" / f"{AVERAGE}.jsonl").exists)
    running = [pid for pid in pids() if is_alive(pid)]
    assert len(running) == 1
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not is_alive(running[0]))


@pytest.mark.distributed
@pytest.mark.parametrize("victim", mostly_long(["sweep", "torchrun"], default=["sweep"]))
def test_a_kill_leaves_no_rank_that_trains(bench, victim):
    """Under torchrun, whose workers have sessions of their own."""
    pids = report_pids(bench)
    bench.behave(baseline="hangs")
    process = start(bench, "torchrun", SPLITS="1", PP="2")
    wait_for(lambda: len(pids()) == 2)
    ranks = pids()
    agent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(process.pid if victim == "sweep" else agent, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: not any(map(is_alive, [*ranks, agent])))


def test_a_run_that_outlives_its_sweep_keeps_the_others_out(bench, capsys):
    pids = report_pids(bench, ignoring=True)
    bench.behave(baseline="hangs")
    process = start(bench)
    wait_for((bench.output / "metrics" / f"{BASELINE}.jsonl").exists)
    process.kill()
    process.communicate(timeout=60)
    (left,) = [pid for pid in pids() if is_alive(pid)]
    assert main([], bench.environ(), num_gpus=0) == 1
    assert "another sweep is writing there" in capsys.readouterr().err
    os.kill(left, signal.SIGKILL)
    wait_for(lambda: not is_alive(left))
    bench.behave()
    assert bench.sweep() == 0


def test_the_figures_of_a_run_are_those_of_one_start(bench):
    """Though something that an earlier start has left goes on writing."""
    output = Output(bench.output)
    output.claim()
    first = output.started(BASELINE, output.begin(BASELINE))
    first.write_text('{"iteration": 1}\n')
    second = output.started(BASELINE, output.begin(BASELINE))
    assert not first.exists()
    second.write_text('{"iteration": 1}\n')
    first.parent.mkdir(exist_ok=True)
    first.write_text('{"iteration": 1}\n{"iteration": 2}\n')
    assert read_metrics(output.metrics(BASELINE)) == [{"iteration": 1}]
    output.end(BASELINE)
    with first.open("a") as stream:
        stream.write('{"iteration": 3}\n')
    assert read_metrics(output.metrics(BASELINE)) == [{"iteration": 1}]
    assert not output.metrics(BASELINE).is_symlink()
    assert not second.parent.exists()
