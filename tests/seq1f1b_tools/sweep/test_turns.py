"""Runs that take turns: one at a time, in order, however some of them end."""

import threading

import pytest

from seq1f1b_tools.sweep.records import read_metrics
from seq1f1b_tools.sweep.turns import RANK_SCRIPT
from seq1f1b_tools.sweep.turns.conductor import Turns
from seq1f1b_tools.sweep.turns.rank import Turn
from tests.distributed.training_runs import ARGUMENTS, SCRIPTS, run_ranks


class Run(threading.Thread):
    """Takes a number of steps in turn and notes each of them."""

    def __init__(self, turns, place, num_steps, notes):
        super().__init__(daemon=True)
        self.turns, self.place, self.num_steps, self.notes = turns, place, num_steps, notes

    def run(self):
        turn = Turn(self.turns.environment(self.place))
        for _ in range(self.num_steps):
            turn.wait()
            self.notes.append(("begins", self.place))
            self.notes.append(("ends", self.place))
        self.turns.leave(self.place)


def steps(*nums_steps, absent=()):
    """Let runs with these numbers of steps take turns and return the order of their steps."""
    notes = []
    with Turns(len(nums_steps)) as turns:
        runs = [Run(turns, place, number, notes) for place, number in enumerate(nums_steps)]
        for place, run in reversed(list(enumerate(runs))):
            if place in absent:
                turns.leave(place)
            else:
                run.start()
        for place, run in enumerate(runs):
            if place not in absent:
                run.join(20)
                assert not run.is_alive()
    order = [place for what, place in notes if what == "begins"]
    assert notes == [(what, place) for place in order for what in ("begins", "ends")]
    return order


def test_steps_alternate_in_the_order_of_the_runs():
    assert steps(3, 3, 3) == [0, 1, 2] * 3


def test_the_others_go_on_when_a_run_has_ended():
    assert steps(1, 3, 2) == [0, 1, 2, 1, 2, 1]
    assert steps(3, 1, 1) == [0, 1, 2, 0, 0]


def test_a_run_that_never_came_is_not_waited_for():
    assert steps(2, 2, 2, absent=(0,)) == [1, 2, 1, 2]
    assert steps(2, 2, absent=(0, 1)) == []


def test_a_run_is_let_go_when_all_have_finished():
    notes = []

    def run(turns, place, num_steps):
        turn = Turn(turns.environment(place))
        for _ in range(num_steps):
            turn.wait()
            notes.append(place)
        turn.finish()
        notes.append("gone")

    with Turns(3) as turns:
        runs = [
            threading.Thread(target=run, args=(turns, *args), daemon=True)
            for args in ((0, 1), (1, 3), (2, 2))
        ]
        for thread in runs:
            thread.start()
        for thread in runs:
            thread.join(20)
            assert not thread.is_alive()
    assert notes == [0, 1, 2, 1, 2, 1, "gone", "gone", "gone"]


def test_one_run_has_every_turn():
    assert steps(4) == [0] * 4


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_training_waits_for_its_turn(tmp_path, monkeypatch):
    metrics = tmp_path / "metrics.jsonl"
    with Turns(2) as turns:
        for name, value in turns.environment(0).items():
            monkeypatch.setenv(name, value)
        counted = []

        def count():
            turn = Turn(turns.environment(1))
            for _ in range(2):
                turn.wait()
                counted.append(len(read_metrics(metrics)))
            turns.leave(1)

        threading.Thread(target=count, daemon=True).start()
        run = run_ranks(
            2, RANK_SCRIPT, SCRIPTS / "plain_gpt.py", *ARGUMENTS, "--train-iters", 3,
            "--pipeline-model-parallel-size", 2, "--seq1f1b-splits", 2,
            "--seq1f1b-metrics-file", metrics,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert (counted, len(read_metrics(metrics))) == ([1, 2], 3)
