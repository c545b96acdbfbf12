"""Megatron beside a GPU, with weights, gradients and optimizer on the CPU."""

import shlex

import torch

from megatron.adaptor.offload.homes import OnHost
from tests.programs import ask

# Takes the command line of a job with offloaded chunks as on a machine with a GPU and Transformer
# Engine's kernels, and answers with what becomes of both, then with what a resident job has.
_PROGRAM = """
import json, sys
from megatron.adaptor import install
install()
from megatron.adaptor.cpu import device
from megatron.adaptor.offload import homes, host_memory
from megatron.core import utils
from megatron.training import dist_signal_handler
from megatron.training.arguments import validate_args
from tests.programs import parse_args
kernel = object()
for attribute in homes._WITHOUT_KERNELS:
    type(attribute)(attribute.target, kernel, attribute.reason).apply()
device.has_gpu = lambda: True
host_memory.available_bytes = lambda: 2**50
answers = []
for flags in json.loads(sys.stdin.read()):
    sys.argv = ["script", *flags]
    args = parse_args()
    validate_args(args)
    left = [a.target for a in homes._WITHOUT_KERNELS if a.original() is kernel]
    answers.append([args.distributed_backend, left])
dist_signal_handler.torch.distributed.get_backend = lambda: homes.BACKENDS
answers.append(str(dist_signal_handler.get_device(0)))
print("ANSWER" + json.dumps(answers))
"""
_FLAGS = shlex.split(
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --bf16 "
    "--max-position-embeddings 128 --micro-batch-size 1 --global-batch-size 4 --train-iters 4 "
    "--attention-dropout 0 --hidden-dropout 0 --pipeline-model-parallel-size 2 "
    "--position-embedding-type rope --num-virtual-stages-per-pipeline-rank 2 "
    "--use-distributed-optimizer"
)


def test_kernels_and_nccl_give_way_where_chunks_are_offloaded():
    gloo = ["--distributed-backend", "gloo"]
    offload = ["--offload-model-chunks", "1"]
    cases = [_FLAGS, _FLAGS + offload, _FLAGS + offload + gloo]
    resident, offloaded, over_gloo, device = ask(_PROGRAM, cases, RANK="0", WORLD_SIZE="4")
    assert resident[0] == "nccl"
    assert len(resident[1]) == 12
    assert offloaded == ["cpu:gloo,cuda:nccl", []]
    assert over_gloo == ["gloo", []]
    assert device == "cpu"


def test_what_is_asked_of_the_gpu_is_on_the_cpu():
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with OnHost():
        made = [
            torch.zeros(1, device="cuda"),
            torch.tensor([1.0], device=0),
            torch.empty_like(parameter, device=torch.device("cuda", 1)),
            parameter.new_zeros(2, device="cuda:0"),
            parameter.to("cuda"),
            parameter.to(device="cuda", dtype=torch.float32),
            parameter.cuda(),
        ]
        names = [parameter.type(), made[0].type(), torch.ones(1).half().type()]
        assert parameter.type(torch.float32).dtype is torch.float32
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert names == [f"torch.cuda.{kind}Tensor" for kind in ("BFloat16", "Float", "Half")]
    assert parameter.type() == "torch.BFloat16Tensor"


def test_homes_are_asked_for_in_pinned_memory(monkeypatch):
    asked = []

    class Memory(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is not torch.zeros:
                return function(*args, **(kwargs or {}))
            asked.append((kwargs.pop("pin_memory"), kwargs["device"]))
            return function(*args, **kwargs)

    with Memory(), OnHost(pinned=True):
        torch.zeros(3, device="cuda")
    assert asked == [(True, torch.device("cpu"))]
