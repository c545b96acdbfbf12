"""The count of live activations against sums by hand and against resident memory."""

import gc
import subprocess
import sys

import torch
from torch import nn

from seq1f1b.attention import CarryPool
from seq1f1b.runtime import ActivationMeter, WeightGradients

MIB = 2**20


def test_each_storage_counts_once_and_parameters_do_not():
    layer = nn.Linear(256, 256)
    x = torch.randn(1024, 256, requires_grad=True)  # 1 MiB
    meter = ActivationMeter(CarryPool(), WeightGradients())
    with meter.measuring(layer.parameters()):
        y = layer(x)  # saves x
        z = (y * x).exp()  # saves y and x, and the result
        assert meter.live_bytes == 3 * MIB
        z.sum().backward()
        del y, z
        gc.collect()
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 3 * MIB


def test_graphs_without_a_backward_are_freed_and_count_in_their_own_step_only():
    x = torch.randn(MIB // 4, requires_grad=True)
    meter = ActivationMeter(CarryPool(), WeightGradients())
    with meter.measuring([]):
        y = x.exp()  # saves its result
    with meter.measuring([]):
        z = y.tanh()
    assert (meter.live_bytes, meter.peak_bytes) == (2 * MIB, MIB)
    del y, z
    gc.collect()
    assert meter.live_bytes == 0


def test_the_carry_counts_too():
    pool = CarryPool()
    meter = ActivationMeter(pool, WeightGradients())
    with meter.measuring([]):
        buffer = pool.take((MIB,), torch.uint8, torch.device("cpu"))
        x = torch.randn(MIB // 4, requires_grad=True)
        y = x.exp()
        assert meter.peak_bytes == 2 * MIB
        pool.give_back(buffer)
        del y
        pool.take((MIB // 2,), torch.uint8, torch.device("cpu"))
    assert meter.peak_bytes == 2 * MIB


_RESIDENT = """
import gc, os, resource, torch
from torch import nn
from seq1f1b.attention import CarryPool
from seq1f1b.runtime import ActivationMeter, WeightGradients

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(24)))
x = torch.randn(8192, 512)
model(x[:1]).sum().backward()
meter = ActivationMeter(CarryPool(), WeightGradients())
gc.collect()
before = resident()
with meter.measuring([*model.parameters(), x]):
    y = model(x)
    grown, counted = resident() - before, meter.live_bytes
print(grown, counted)
"""


def test_count_agrees_with_resident_memory():
    run = subprocess.run(
        [sys.executable, "-c", _RESIDENT], capture_output=True, text=True, check=True
    )
    grown, counted = map(int, run.stdout.split())
    assert counted > 512 * MIB
    # The last output belongs to the program, not to autograd.
    assert abs(grown - 16 * MIB - counted) < 0.05 * counted


def test_a_storage_that_is_emptied_and_filled_again_counts_what_it_holds():
    x = torch.randn(MIB // 4, requires_grad=True)
    meter = ActivationMeter(CarryPool(), WeightGradients())
    with meter.measuring([x]):
        y = x * 2
        z = y.exp()  # saves z
        z.square()  # saves z again
        storage = z.untyped_storage()
        kept = z.detach().clone()
        storage.resize_(0)
        meter.recount()
        assert meter.live_bytes == 0
        storage.resize_(MIB)
        z.detach().copy_(kept)
        meter.recount()
        assert meter.live_bytes == MIB
        z.sum().backward()
        del y, z
        gc.collect()
    assert meter.live_bytes == 0
    assert meter.peak_bytes == MIB


def test_hooks_of_code_inside_are_seen():
    x = torch.randn(MIB // 4, requires_grad=True)
    meter = ActivationMeter(CarryPool(), WeightGradients())

    def halved(tensor):
        return "scaled", tensor.half()

    with meter.measuring([x]):
        y = (x * 0.1).exp()
        assert meter.live_bytes == MIB
        with torch.autograd.graph.saved_tensors_hooks(halved, lambda packed: packed[1].float()):
            z = y.exp()  # packs its result in half the bytes
        assert meter.live_bytes == 3 * MIB // 2
        z.sum().backward()
        expected = z.detach() * y.detach() * 0.1
        del y, z
        gc.collect()
        assert meter.live_bytes == 0
    torch.testing.assert_close(x.grad, expected, rtol=2e-3, atol=1e-4)
