"""``plain_gpt.py`` on which a fault befalls one rank: FAULT=KIND:RANK:ITERATION in the environment.

KIND: kill (SIGKILL), stop (SIGSTOP), leave (exit code 0), memory (no memory left), update (SIGKILL
in an update of the step before), arrival (SIGKILL in an update of the step that computes), worker
(its data worker is killed), end (its data end), or an action's kind: F, B, I, W, SEND_F, RECV_B and
so on.
"""

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import plain_gpt
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

KIND, RANK, ITERATION = os.environ.get("FAULT", "none:-1:-1").split(":")


def is_time():
    is_iteration = getattr(get_args(), "curr_iteration", -1) + 1 == int(ITERATION)
    return is_iteration and torch.distributed.get_rank() == int(RANK)


def befall():
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif KIND == "leave":
        sys.exit(0)
    elif KIND == "memory":
        torch.empty(2**60, dtype=torch.uint8)


has_begun = threading.Event()  # the iteration


def forward_step(data_iterator, model):
    if is_time():
        has_begun.set()
        befall()
    return plain_gpt.forward_step(data_iterator, model)


class Ending(plain_gpt.PeriodicText):
    """Data whose worker dies, or that end, as the fault says."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() and index >= 3 * (int(ITERATION) - 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def datasets_provider(num_samples, vp_stage=None):
    sets = plain_gpt.datasets_provider(num_samples, vp_stage)
    if KIND == "worker" and torch.distributed.get_rank() == int(RANK):
        sets[0].__class__ = Ending
    if KIND == "end" and torch.distributed.get_rank() == int(RANK):
        sets[0].num_samples = 3 * (int(ITERATION) - 1) + 1
    return sets


def fail_in_action():
    """Let the executor raise in an action of the kind, on the rank and iteration named."""
    from seq1f1b.runtime import executor
    from seq1f1b.schedule import Kind

    kind = Kind(KIND)
    init = executor._Run.__init__

    def __init__(run, *args):
        init(run, *args)
        original = run.handlers[kind]

        def handler(action):
            if is_time():
                raise RuntimeError("cosmic ray")
            original(action)

        run.handlers[kind] = handler

    executor._Run.__init__ = __init__


def kill_in_update():
    """Die in the second chunk's update of the step before, once the iteration has begun.

    Or in the first of the iteration itself, while the other chunk goes backward.
    """
    step, updates = torch.optim.AdamW.step, itertools.count(1)

    def step_or_die(optimizer, *args):
        result = step(optimizer, *args)
        if threading.current_thread() is threading.main_thread():
            return result
        is_second = next(updates) % 2 == 0
        number = max(state["step"] for state in optimizer.state.values())
        is_mine = torch.distributed.get_rank() == int(RANK)
        if KIND == "arrival" and is_mine and number == int(ITERATION) and not is_second:
            os.kill(os.getpid(), signal.SIGKILL)
        is_before = KIND == "update" and is_mine and number == int(ITERATION) - 1
        if is_second and is_before and has_begun.wait(timeout=60):
            time.sleep(0.05)  # an action or two
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    torch.optim.AdamW.step = step_or_die


if __name__ == "__main__":
    if KIND in ("update", "arrival"):
        kill_in_update()
    if KIND.isupper():
        fail_in_action()
    if KIND == "settings" and os.environ["RANK"] == RANK:
        sys.argv += ["--seq1f1b-balance-method", "average"]
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        plain_gpt.model_provider,
    )
