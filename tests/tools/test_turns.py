"""Runs that take turns: one at a time, in order, however some of them end."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tools.sweep.metrics import read_metrics
from tools.sweep.take_turns import Turn
from tools.sweep.turns import Turns

ROOT = Path(__file__).parents[2]


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
    """Let runs with so many steps take turns and return the order of their steps."""
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


def test_one_run_has_every_turn():
    assert steps(4) == [0] * 4


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_training_waits_for_its_turn(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    arguments = (
        "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 32 --vocab-size 64 "
        "--max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 3 "
        "--pipeline-model-parallel-size 2 --seq1f1b-splits 2 --attention-dropout 0 --lr 1e-4 "
        "--mock-data --tokenizer-type NullTokenizer --eval-iters 1 --eval-interval 9 "
        f"--seq1f1b-metrics-file {metrics}"
    )
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2"
    scripts = [ROOT / "tools/sweep/take_turns.py", ROOT / "pretrain_gpt.py"]
    with Turns(2) as turns:
        process = subprocess.Popen(
            [sys.executable, *torchrun.split(), *map(str, scripts), *arguments.split()],
            env={**os.environ, **turns.environment(0)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        counted = []

        def count():
            turn = Turn(turns.environment(1))
            for _ in range(2):
                turn.wait()
                counted.append(len(read_metrics(metrics)))
            turns.leave(1)

        threading.Thread(target=count, daemon=True).start()
        text, _ = process.communicate(timeout=100)
    assert process.returncode == 0, text
    assert (counted, len(read_metrics(metrics))) == ([1, 2], 3)
