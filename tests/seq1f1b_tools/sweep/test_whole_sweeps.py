"""Whole sweeps: what they run, record, repeat and report."""

import io
import json
import signal

import pytest
from rich.console import Console

from seq1f1b_tools.sweep.main import main
from seq1f1b_tools.sweep.nodes import Nodes
from seq1f1b_tools.sweep.records import (
    speedup,
)
from seq1f1b_tools.sweep.settings import (
    ROOT,
)
from seq1f1b_tools.sweep.sweep import Sweep
from tests.processes import wait_for
from tests.selection import mostly_long
from tests.seq1f1b_tools.sweep.bench import AVERAGE, BASELINE, FAKE_SCRIPT, UNIFORM, start


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
    assert [float(uniform[f"speedup_{name}"]) for name in ("ends", "splitting", "executor")] == (
        pytest.approx([1, 1, 3], abs=1e-4)
    )
    assert baseline["speedup_executor"] == "1.0000"
    product = "4.000 = 1.333 (theory) x 1.000 (ends) x 1.000 (splitting) x 3.000 (executor)"
    assert f"seq1f1b-s4-uniform_comp: {product}" in bench.text
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
    for chart in ("throughput.png", "memory.png", "bubble.png", "loss.png"):
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


@pytest.mark.parametrize(
    "line",
    mostly_long(
        ["null", "3", "[]", "{}", '{"iteration": 2}', "[" * 99999, "1" * 9999, "\ud800", "x"],
        default=['{"iteration": 2}', "\ud800"],
    ),
)
@pytest.mark.parametrize("place", ["metrics", "runs"])
def test_a_damaged_file_of_results_has_the_run_repeated(bench, line, place):
    assert bench.sweep() == 0
    bench.calls()
    file = bench.output / place / f"{AVERAGE}.{'jsonl' if place == 'metrics' else 'json'}"
    lines = file.read_text().splitlines()
    lines[1 if place == "metrics" else 0] = line
    file.write_text("\n".join(lines), errors="surrogatepass")
    assert bench.sweep() == 0
    assert bench.calls() == [AVERAGE]
    assert bench.rows()[AVERAGE]["status"] == "ok"


@pytest.mark.parametrize(
    "change",
    mostly_long(
        [
            {"milliseconds": 0},
            {"milliseconds": "5"},
            {"milliseconds": float("inf")},
            {"tokens_per_second": -1},
            {"bubble_ratio": []},
            {"bubble_ratio": [0.1]},
            {"peak_activation_bytes": None},
            {"iteration": 9},
            {"lm_loss": "8"},
        ],
        default=[{"milliseconds": 0}, {"iteration": 9}],
    ),
)
def test_figures_that_cannot_be_true_are_not_shown(bench, change):
    assert bench.sweep() == 0
    bench.calls()
    file = bench.output / "metrics" / f"{AVERAGE}.jsonl"
    lines = file.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    file.write_text("\n".join(lines))
    assert bench.sweep() == 0
    assert bench.calls() == [AVERAGE]


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
