"""Each check runs in a process of its own, since ``install`` changes torch for good."""

import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.adaptor.cpu import device as cpu_device
from tests import forks

INSTALL = (
    "from megatron.adaptor.cpu import device as cpu_device; cpu_device.install(); import torch; "
)
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    environment = os.environ | NO_GPU | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


EXPRESSIONS = {
    # where tensors are created and moved to
    "torch.zeros(2, device='cuda').device.type": "cpu",
    "torch.ones(2, device='cuda:3').device.type": "cpu",
    "torch.tensor([1], device=torch.device('cuda', 0)).device.type": "cpu",
    "torch.arange(2, device=torch.cuda.current_device()).device.type": "cpu",
    "torch.empty_like(torch.ones(2), device=f'cuda:{torch.cuda.current_device()}').device.type": (
        "cpu"
    ),
    "torch.empty(2, pin_memory=True).pin_memory().device.type": "cpu",
    "torch.ones(2).new_zeros(3, device='cuda').device.type": "cpu",
    "torch.ones(2).to('cuda').device.type": "cpu",
    "torch.ones(2).to(0, torch.float64).dtype == torch.float64": True,
    "torch.ones(2).to(device='cuda:1', dtype=torch.int32).dtype == torch.int32": True,
    "torch.ones(2).to(torch.ones(2, dtype=torch.int64)).dtype == torch.int64": True,
    "torch.ones(2).cuda(non_blocking=True).device.type": "cpu",
    "torch.nn.Linear(2, 2, device='cuda').cuda().to('cuda').weight.device.type": "cpu",
    "in_context('cuda')": "cpu",
    # other devices keep their meaning
    "torch.empty(2, device='meta').device.type": "meta",
    "torch.empty(2).to('meta').device.type": "meta",
    "in_context('meta')": "meta",
    # names and types of tensors
    "torch.ones(2).type()": "torch.cuda.FloatTensor",
    "torch.nn.Parameter(torch.ones(2).bfloat16()).type()": "torch.cuda.BFloat16Tensor",
    "torch.ones(2).type('torch.cuda.HalfTensor').dtype == torch.float16": True,
    "isinstance(torch.ones(2), torch.cuda.FloatTensor)": True,
    "isinstance(torch.ones(2), torch.cuda.HalfTensor)": False,
    # random state
    "draws_again(torch.cuda.manual_seed)": True,
    "draws_again(torch.manual_seed)": True,
    "restores_random_state()": True,
    "loading_data_keeps_random_state()": True,
    # what torch.cuda tells
    "torch.cuda.is_available()": True,
    "torch.cuda.device_count()": 1,
    "torch.cuda.memory_allocated() > 1e7": True,
    "torch.cuda.memory_stats()['allocated_bytes.all.peak'] >= torch.cuda.memory_reserved() / 2": (
        True
    ),
    "milliseconds() >= 10": True,
    "torch.accelerator.is_available()": False,
    # torch's own machinery still works
    "checkpointed_gradient()": [2.0, 2.0],
    "torch.compile(lambda x: x + 1)(1)": 2,
    "torch.compile(mode='max-autotune')(lambda x: x + 1)(1)": 2,
    "load_to_cuda()": "cpu",
    "cpu_device.install(), cpu_device.installed()": [None, True],
}

HELPERS = """
import io, json, time
import torch.utils.checkpoint, torch.utils.data

def in_context(device):
    with torch.device(device):
        return torch.empty(2).device.type

def draws_again(seed):
    seed(5)
    first = torch.rand(3, device="cuda")
    seed(5)
    return torch.equal(first, torch.rand(3, device="cuda"))

def restores_random_state():
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    return torch.equal(first, torch.rand(3, device="cuda"))

def loading_data_keeps_random_state():
    state = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(list(range(8)), shuffle=True, pin_memory=True)
    assert sorted(int(item) for item in loader) == list(range(8))
    return torch.equal(state, torch.get_rng_state())

def milliseconds():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        start.record()
        time.sleep(0.01)
        end.record(side)
    torch.cuda.synchronize()
    return start.elapsed_time(end)

def checkpointed_gradient():
    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(lambda x: x * x, x, use_reentrant=True).sum().backward()
    return x.grad.tolist()

def load_to_cuda():
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    file.seek(0)
    return torch.load(file, map_location="cuda").device.type
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, object]:
    """What each expression evaluates to under ``install``."""
    code = (
        INSTALL
        + HELPERS
        + f"print(json.dumps({{text: eval(text) for text in {list(EXPRESSIONS)!r}}}))"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_cuda_is_the_cpu(answers: dict[str, object], expression: str) -> None:
    assert answers[expression] == EXPRESSIONS[expression]


def test_touches_nothing_where_a_gpu_is() -> None:
    code = """
import torch
torch.cuda.is_available = lambda: True
before = torch.zeros, torch.Tensor.to, torch.cuda.Stream, torch.distributed.new_group
from megatron.adaptor.cpu import device as cpu_device
cpu_device.install()
after = torch.zeros, torch.Tensor.to, torch.cuda.Stream, torch.distributed.new_group
assert before == after and not cpu_device.installed()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_refuses_to_come_after_megatron() -> None:
    result = python("import sys, types; sys.modules['megatron.core'] = types; " + INSTALL)
    assert "call megatron.adaptor.install() before the first import of Megatron" in result.stderr


@pytest.mark.parametrize("rank, num_lines", [("0", 1), ("1", 0)])
def test_rank_0_says_so_in_one_line(rank: str, num_lines: int) -> None:
    result = python(INSTALL + "cpu_device.install()", RANK=rank)
    line = "no CUDA device: training on CPU over gloo\n"
    assert (result.stdout + result.stderr) == line * num_lines


COLLECTIVES = """
import torch.distributed as dist
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
group = dist.new_group([0, 1], backend="nccl", pg_options=object())
dist.barrier(group, device_ids=[torch.cuda.current_device()])
rank = dist.get_rank()
summed = torch.full((2,), rank + 1.0)
averaged = summed.clone()
dist.all_reduce(summed, group=group)
dist.all_reduce(averaged, op=dist.ReduceOp.AVG, group=group, async_op=True).wait()
shard, whole = torch.empty(1), torch.tensor([1.0, 2.0]) * (rank + 1)
dist.reduce_scatter_tensor(shard, whole, op=dist.ReduceOp.AVG, group=group)
assert dist.get_backend() == dist.get_backend(group) == "gloo"
assert summed.tolist() == [3.0, 3.0] and averaged.tolist() == [1.5, 1.5]
received = torch.empty(2)
ones = torch.tensor([1, 1])
dist.all_to_all_single(received, torch.tensor([1.0, 2.0]), ones, ones)
assert received.tolist() == [rank + 1.0, rank + 1.0]
assert shard.item() == 1.5 * (rank + 1) and whole.tolist() == [rank + 1.0, 2 * rank + 2.0]
parts = [torch.zeros(2, 2), torch.zeros(3, 2)]
dist.all_gather(parts, torch.full((2 + rank, 2), rank + 1.0), group=group)
assert [part.unique().tolist() for part in parts] == [[1.0], [2.0]]
mine, given = torch.zeros(2 + rank, 2), [part * (rank + 1) for part in parts]
dist.reduce_scatter(mine, given, group=group)
assert mine.unique().tolist() == [3.0 * (rank + 1)]
assert [part.unique().tolist() for part in given] == [[rank + 1.0], [2.0 * (rank + 1)]]
import datetime, pathlib
others = [dist.new_group([0, 1], timeout=datetime.timedelta(seconds=7)) for _ in range(5)]
for other in others:
    dist.all_reduce(summed, group=other)
assert {other._get_backend(torch.device("cpu")).options._timeout.seconds for other in others} == {7}
threads = [thread.read_text() for thread in pathlib.Path("/proc/self/task").glob("*/comm")]
own = pathlib.Path("/proc/self/comm").read_text()  # what a device's thread is called too
assert threads.count(own) == 2, threads
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_nccl_groups_and_averages_work_over_gloo() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", INSTALL + COLLECTIVES],
            env=os.environ
            | NO_GPU
            | address
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


TINY = """
--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --micro-batch-size 1
--max-position-embeddings 32 --global-batch-size 4 --train-iters 3 --lr 1e-3 --log-interval 1
--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --split 90,5,5
--eval-interval 100 --eval-iters 1 --pipeline-model-parallel-size 2
"""


def losses(*command: str) -> list[float]:
    """What rank 1 of two prints as training, validation and test loss."""
    root = Path(__file__).parents[2]
    result = forks.python(*command, *TINY.split(), num_ranks=2, environ=NO_GPU, cwd=root)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stderr.count(cpu_device.MESSAGE) == 1
    return [float(number) for number in re.findall(r"lm loss(?: value)?: (\S+)", result.stdout)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(["pretrain_gpt.py"], id="our script"),
        pytest.param(
            ["-m", "megatron.adaptor", "tests/distributed/scripts/plain_gpt.py"],
            id="any script",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_same_command_trains_alike_twice(script: list[str]) -> None:
    first = losses(*script)
    assert len(first) == 5
    assert first[0] == pytest.approx(math.log(128), rel=0.02)
    assert first == losses(*script)
