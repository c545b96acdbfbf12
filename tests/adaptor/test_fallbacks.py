import json
from argparse import ArgumentParser, Namespace

import pytest

from megatron.adaptor.cpu import device as cpu_device
from megatron.adaptor.without_engine import fallbacks
from tests.forks import python

PLAIN = Namespace(
    transformer_impl="local",
    fp8=None,
    fp4=None,
    tp_comm_overlap=False,
    cuda_graph_impl="none",
    nccl_ub=False,
    profile=False,
    use_pytorch_profiler=False,
    use_persistent_ckpt_worker=False,
    async_strategy="mcore",
)
DEMANDING = [
    ("transformer_impl", "transformer_engine", "--transformer-impl"),
    ("transformer_impl", "inference_optimized", "--transformer-impl"),
    ("fp8", "hybrid", "--fp8-format"),
    ("fp4", "e2m1", "--fp4-format"),
    ("tp_comm_overlap", True, "--tp-comm-overlap"),
    ("cuda_graph_impl", "local", "--cuda-graph-impl"),
    ("nccl_ub", True, "--use-nccl-ub"),
    ("profile", True, "--profile"),
    ("use_persistent_ckpt_worker", True, "--use-persistent-ckpt-worker"),
]


def arguments(**changes: object) -> Namespace:
    return Namespace(**(vars(PLAIN) | changes))


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_plain_arguments_are_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch)
    monkeypatch.setattr(cpu_device, "installed", lambda: True)
    assert fallbacks.refusals(PLAIN) == []
    assert fallbacks.refusals(arguments(profile=True, use_pytorch_profiler=True)) == []


@pytest.mark.parametrize("name, value, flag", DEMANDING)
def test_without_a_gpu_the_flag_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, flag: str
) -> None:
    monkeypatch.setattr(cpu_device, "installed", lambda: True)
    (message,) = fallbacks.refusals(arguments(**{name: value}))
    assert message.startswith(f"{flag} needs a CUDA device and there is none: ")


@pytest.mark.parametrize("name, value, flag", DEMANDING[:5])
def test_without_the_package_flag_and_package_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, flag: str
) -> None:
    without_packages(monkeypatch)
    monkeypatch.setattr(cpu_device, "installed", lambda: False)
    (message,) = fallbacks.refusals(arguments(**{name: value}))
    assert message.startswith(f"{flag} needs transformer_engine, not installed: ")


def test_with_gpu_and_packages_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(cpu_device, "installed", lambda: False)
    assert fallbacks.refusals(arguments(**{name: value for name, value, _ in DEMANDING})) == []


def test_all_refusals_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_device, "installed", lambda: True)
    args = arguments(fp8="hybrid", nccl_ub=True)
    assert [message.split()[0] for message in fallbacks.refusals(args)] == [
        "--fp8-format",
        "--use-nccl-ub",
    ]


def test_a_parser_without_a_known_argument_is_refused() -> None:
    with pytest.raises(RuntimeError, match="have no 'transformer_impl' any more"):
        fallbacks.set_defaults(ArgumentParser())


MEGATRON = """
import json, sys
from megatron.adaptor import install
install()
from megatron.adaptor.without_engine import fallbacks
from megatron.training.arguments import parse_args, validate_args
from megatron.core.datasets.utils import compile_helpers
compile_helpers()
args = parse_args()
names = [default.dest for default in fallbacks.DEFAULTS]
try:
    validate_args(args)
    error = None
except SystemExit as e:
    error = str(e.code)
print(json.dumps([{name: getattr(args, name) for name in names}, error]))
"""
SIZES = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --lr 1e-3 "
MORE = "--max-position-embeddings 8 --micro-batch-size 1 --train-iters 1 --mock-data"


def parsed_by_megatron(*flags: str) -> tuple[dict[str, object], str | None]:
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    result = python("-c", MEGATRON, *(SIZES + MORE).split(), *flags, environ=no_gpu)
    assert result.returncode == 0, result.stderr
    return tuple(json.loads(result.stdout.splitlines()[-1]))


def test_megatrons_defaults_follow_what_is_there() -> None:
    defaults, error = parsed_by_megatron()
    assert error is None
    assert defaults == {default.dest: default.value for default in fallbacks.DEFAULTS}


def test_what_the_user_asks_for_by_name_is_refused_and_not_replaced() -> None:
    args, error = parsed_by_megatron("--transformer-impl", "transformer_engine")
    assert args["transformer_impl"] == "transformer_engine"
    assert error is not None
    assert "--transformer-impl needs a CUDA device and there is none" in error
