"""The planner's word at the start of training: splits chosen, settings warned of, memory needed."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron.adaptor.command_line.flags import AUTO
from megatron.adaptor.patches import Patch
from seq1f1b.planner.advice import warnings, warnings_by_operations
from seq1f1b.planner.arguments import options
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.gpu import Gpu
from seq1f1b.planner.here import device_here
from seq1f1b.planner.memory import GIB, estimate_peak, trace_memory
from seq1f1b.planner.problem import Problem
from seq1f1b.planner.refusals import REFUSED, VISITING
from seq1f1b.planner.resolve import resolve
from seq1f1b.planner.runtime import runtime
from seq1f1b.planner.setting import Setting
from seq1f1b.planner.time import StepTime, step_time
from seq1f1b.sequence import BALANCE_METHODS

_SPLITS = (1, 2, 4, 8, 16)
_DESTINATIONS = {"--fp8-format": "fp8", "--fp4-format": "fp4"}
# Values without effect, where these are not false.
_OFF = {
    "num_distributed_optimizer_instances": 1,
    "tensor_parallel_num_weight_shards": 1,
    "expert_tensor_parallel_num_weight_shards": 1,
    "mlp_chunks_for_training": 1,
    "cuda_graph_impl": "none",
}
# Megatron derives these from the flags that have replaced them.
_DERIVED = {"encoder_num_layers", "encoder_seq_length", "decoder_num_layers", "decoder_seq_length"}
_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


def choose_splits(args: argparse.Namespace) -> str | None:
    """Replace --seq1f1b-splits auto by the number and balance of the shortest simulated step.

    Returns a fault where nothing can be chosen. Rank 0 prints the choice and why.
    """
    if args.seq1f1b_splits != AUTO:
        return None
    if faults := list(not_modelled(args)):
        return f"--seq1f1b-splits auto: {'; '.join(faults)}; or give a number of splits"
    device = described_device()
    if device is None:
        return (
            "--seq1f1b-splits auto: there is no description of this device to choose by: run "
            "`seq1f1b calibrate` on a machine of its own, or give a number"
        )
    balances = BALANCE_METHODS if args.seq1f1b_balance_method == "uniform_comp" else ("average",)
    try:
        steps = list(_steps(args, device, balances))
    except SettingError as error:
        return f"--seq1f1b-splits auto: {'; '.join(error.faults)}"
    if not steps:
        return "--seq1f1b-splits auto: no number of splits is possible: give --seq1f1b-splits 1"
    fitting = [step for step in steps if _gib(step.setting, device) <= device.usable_gib.value]
    best = min(fitting or steps, key=lambda step: step.seconds)
    args.seq1f1b_splits = best.setting.num_splits
    args.seq1f1b_balance_method = best.setting.arguments.seq1f1b_balance_method
    one = next((step for step in steps if step.setting.num_splits == 1), None)
    gain = f", {one.seconds / best.seconds:.2f}x of one split's speed" if one else ""
    _say(
        args,
        f"--seq1f1b-splits auto: {args.seq1f1b_splits}, {args.seq1f1b_balance_method}: the "
        f"shortest step of {len(steps)} simulated on {device.title}{gain}, about "
        f"{_gib(best.setting, device):.1f} GiB on the fullest stage",
    )
    return None


def _steps(args: argparse.Namespace, device: Gpu, balances: tuple[str, ...]) -> Iterator[StepTime]:
    problem = Problem({}, args.world_size, device, device.gpus_per_node)
    for number in _SPLITS:
        for balance in balances if number > 1 else balances[:1]:
            try:
                setting = setting_of(args, splits=number, balance=balance)
            except SettingError:
                if number == 1:
                    raise
                continue
            yield step_time(setting, problem.kernels, problem.runtime)


def _gib(setting: Setting, device: Gpu) -> float:
    return estimate_peak(setting, runtime(device.runtime))


def not_modelled(args: argparse.Namespace) -> Iterator[str]:
    """Yield flags in effect that change memory or time in a way that the planner does not model."""
    for flag, why in (REFUSED | VISITING).items():
        name = _DESTINATIONS.get(flag) or flag.removeprefix("--").replace("-", "_")
        value = getattr(args, name, None)
        if value and value != _OFF.get(name) and name not in _DERIVED:
            yield f"{flag}: {why}"


def setting_of(
    args: argparse.Namespace, *, splits: int | None = None, balance: str | None = None
) -> Setting:
    """Return Megatron's validated arguments as the planner's setting; raises SettingError."""
    values: dict[str, Any] = {}
    for option in options():
        value = getattr(args, option.name, option.default)
        if isinstance(value, list):
            value = tuple(value) if option.many else str(value).replace(" ", "")
        values[option.name] = value
    for name in _DTYPES:
        values[name] = str(values[name]).removeprefix("torch.").replace("float", "fp")
        values[name] = values[name].replace("bfp16", "bf16")
    if args.pipeline_model_parallel_layout is not None:
        values["pipeline_model_parallel_layout"] = str(args.pipeline_model_parallel_layout)
    elif args.virtual_pipeline_model_parallel_size:
        values["num_virtual_stages_per_pipeline_rank"] = args.virtual_pipeline_model_parallel_size
        values["num_layers_per_virtual_pipeline_stage"] = None
    values["seq1f1b_splits"] = splits or values["seq1f1b_splits"]
    values["seq1f1b_balance_method"] = balance or values["seq1f1b_balance_method"]
    if values["multi_latent_attention"]:
        values["group_query_attention"] = False
    return resolve(values, num_gpus=args.world_size)


def advice(args: argparse.Namespace) -> Iterator[str]:
    """Yield what the planner warns of, on this device if it is described, else by operations."""
    try:
        setting, device = setting_of(args), described_device()
    except SettingError:
        return  # a model that the planner does not describe
    if device is None:
        yield from warnings_by_operations(setting, runtime("current"))
        return
    problem = Problem({}, args.world_size, device, device.gpus_per_node)
    yield from warnings(problem, step_time(setting, problem.kernels, problem.runtime))


class MemoryLine:
    """Megatron's estimate of memory, of which sub-sequences make another one."""

    def __init__(self, cuts: Callable[[], bool]) -> None:
        self._cuts = cuts

    def patches(self) -> list[Patch]:
        """Return what is replaced in Megatron's log."""
        target = "megatron.training.training:report_theoretical_memory"
        return [Patch(target, self.report_theoretical_memory)]

    def report_theoretical_memory(
        self,
        original: Callable[..., Any],
        args: argparse.Namespace,
        num_microbatches: int | None = None,
        verbose: bool = False,
    ) -> Any:
        """Print what sub-sequences need, of which Megatron's own estimate knows nothing."""
        if not self._cuts():
            return original(args, num_microbatches=num_microbatches, verbose=verbose)
        if faults := list(not_modelled(args)):
            sys.stdout.write(f"Memory with sub-sequences is not estimated: {'; '.join(faults)}\n")
            return None
        try:
            setting = setting_of(args)
        except SettingError:
            return original(args, num_microbatches=num_microbatches, verbose=verbose)
        if num_microbatches is not None:
            setting = replace(setting, num_micro_batches=num_microbatches)
        trace = trace_memory(setting, runtime("current" if torch.cuda.is_available() else "cpu"))
        for number, stage in enumerate(trace.stages):
            sys.stdout.write(
                f"Memory of stage {number} with {setting.num_splits} sub-sequences: weights and "
                f"optimizer={stage.static / GIB:.2f} GiB, "
                f"activations={stage.activations / GIB:.2f} GiB, "
                f"allocated={stage.allocated / GIB:.2f} GiB, "
                f"reserved={stage.reserved / GIB:.2f} GiB\n"
            )
        sys.stdout.flush()
        return None


def described_device() -> Gpu | None:
    """Return the description of the device that this rank trains on; None if there is none."""
    on_gpu = torch.cuda.is_available() and torch.empty(0).cuda().is_cuda
    return device_here(torch.cuda.get_device_name() if on_gpu else None)


def _say(args: argparse.Namespace, text: str) -> None:
    if args.rank == 0:
        sys.stdout.write(f"> {text}\n")
        sys.stdout.flush()
