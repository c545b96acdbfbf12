"""What Megatron's defaults become where an optional package, or a GPU, is missing.

Megatron's command line is written for an installation with transformer-engine, apex and its own
CUDA kernels. Without them a user would have to type half a dozen flags to switch them off. Here
the defaults follow what is installed, and what the user asked for by name is refused with a
message if it cannot be had.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.adaptor.cpu import device as cpu_device
from megatron.adaptor.patches import Patch


@dataclass(frozen=True)
class Default:
    """The ``value`` that argument ``dest`` starts from while ``package`` cannot be imported."""

    dest: str
    value: Any
    package: str


@dataclass(frozen=True)
class Need:
    """A ``flag`` that is refused while its ``package``, or a CUDA device if None, is missing."""

    flag: str
    is_set: Callable[[argparse.Namespace], bool]
    package: str | None
    advice: str


DEFAULTS = (
    Default("transformer_impl", "local", "transformer_engine"),
    Default("apply_rope_fusion", False, "transformer_engine"),
    Default("masked_softmax_fusion", False, "scaled_upper_triang_masked_softmax_cuda"),
    Default("no_persist_layer_norm", True, "apex"),
)

NEEDS = (
    Need(
        "--transformer-impl",
        lambda args: args.transformer_impl != "local",
        "transformer_engine",
        "use --transformer-impl local, which is the default here",
    ),
    Need("--fp8-format", lambda args: bool(args.fp8), "transformer_engine", "use --bf16"),
    Need("--fp4-format", lambda args: bool(args.fp4), "transformer_engine", "use --bf16"),
    Need(
        "--tp-comm-overlap",
        lambda args: args.tp_comm_overlap,
        "transformer_engine",
        "leave the flag out",
    ),
    Need(
        "--cuda-graph-impl",
        lambda args: args.cuda_graph_impl != "none",
        None,
        "leave the flag out",
    ),
    Need(
        "--use-persistent-ckpt-worker",
        lambda args: (
            getattr(args, "use_persistent_ckpt_worker", False)
            and getattr(args, "async_strategy", None) == "mcore"
        ),
        None,
        "leave the flag out",
    ),
    Need("--use-nccl-ub", lambda args: args.nccl_ub, None, "leave the flag out"),
    Need(
        "--profile",
        lambda args: args.profile and not args.use_pytorch_profiler,
        None,
        "add --use-pytorch-profiler",
    ),
)


def set_defaults(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Change the defaults of Megatron's ``parser`` to what is installed, and return it.

    Flags that the user gives keep the upper hand, as over any default.

    Raises:
        RuntimeError: the parser has no such argument (a version of Megatron not supported).
    """
    known = {action.dest for action in parser._actions}
    for default in DEFAULTS:
        if default.dest not in known:
            raise RuntimeError(f"Megatron's arguments have no '{default.dest}' any more")
        if importlib.util.find_spec(default.package) is None:
            parser.set_defaults(**{default.dest: default.value})
    return parser


def refusals(args: argparse.Namespace) -> list[str]:
    """One message for each flag in ``args`` that needs a package or a GPU that is missing."""
    messages = []
    for need in NEEDS:
        if not need.is_set(args):
            continue
        if cpu_device.installed():
            messages.append(f"{need.flag} needs a CUDA device and there is none: {need.advice}")
        elif need.package and importlib.util.find_spec(need.package) is None:
            messages.append(f"{need.flag} needs {need.package}, not installed: {need.advice}")
    return messages


def patches() -> list[Patch]:
    """Return what is replaced in Megatron-Core so that it runs on what is installed."""
    return [
        Patch("megatron.training.arguments:add_megatron_arguments", add_megatron_arguments),
        Patch("megatron.core.datasets.utils:compile_helpers", compile_helpers),
        Patch(
            "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
            checkpoint_without_output,
        ),
    ]


def add_megatron_arguments(
    original: Callable[..., Any], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Set defaults that follow the packages that are installed."""
    return set_defaults(original(parser))


def checkpoint_without_output(original: Callable[..., None], module: Any, fp8: Any = False) -> None:
    """Recompute norms where Transformer Engine is missing, which the default asks for FP8."""
    # Anything but None, False included, means a recipe to Megatron.
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    original(module, fp8 if has_engine else None)


def compile_helpers(original: Callable[[], None]) -> None:
    """Do without Megatron's Makefile: the wheel has none, but the helpers compiled."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        original()
