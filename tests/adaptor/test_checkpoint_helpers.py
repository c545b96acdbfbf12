"""The processes that help a rank to save get no signal to end, and end with their rank."""

import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest

from megatron.adaptor.checkpoints.helpers import Helpers, end_with_parent

_HELPER = "import time; print('helper', flush=True); time.sleep(60)"


def held_back(*args, **kwargs):
    """Return which signals a process that is started now holds back."""
    status = subprocess.run(
        ["cat", "/proc/self/status"], capture_output=True, text=True, check=True
    ).stdout
    mask = int(status.partition("SigBlk:")[2].split()[0], 16)
    return {number for number in range(1, 32) if mask >> (number - 1) & 1}


@pytest.mark.parametrize(
    "args, expected",
    [
        (None, set()),
        (Namespace(exit_signal_handler=False, exit_signal=signal.SIGTERM), set()),
        (
            Namespace(exit_signal_handler=True, exit_signal=signal.SIGUSR1),
            {signal.SIGTERM, signal.SIGUSR1},
        ),
    ],
)
def test_the_process_that_saves_in_the_background_gets_no_signal_to_end(args, expected):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert Helpers(lambda: args).get_process(held_back, 0) == expected
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_helper_ends_with_its_rank():
    program = (
        "import os, signal, subprocess, sys; "
        "from megatron.adaptor.checkpoints.helpers import end_with_parent; "
        "parent = os.getpid(); "
        f"subprocess.Popen([sys.executable, '-c', {_HELPER!r}], "
        "preexec_fn=lambda: end_with_parent(parent)); "
        "sys.stdin.read(); os.kill(parent, signal.SIGKILL)"
    )
    rank = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert rank.stdout.readline() == "helper\n"
    rank.stdin.close()
    assert rank.wait(timeout=60) == -signal.SIGKILL
    assert rank.stdout.read() == ""  # which ends when no process holds the pipe any more


def test_a_helper_whose_rank_is_gone_does_not_start():
    run = subprocess.run(
        [sys.executable, "-c", "print('helper')"],
        preexec_fn=lambda: end_with_parent(os.getppid() + 1),
        capture_output=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stdout == b""
