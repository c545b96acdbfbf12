"""What an iteration measured, for TensorBoard and Weights & Biases, through Megatron's writers."""

import argparse
from collections.abc import Iterator, Sequence
from functools import cache

from megatron.adaptor.cpu import device as cpu_device
from megatron.adaptor.reports.metrics import IterationMetrics
from megatron.adaptor.reports.outlook import described_device

_MIB = 2**20


def writes(args: argparse.Namespace, iteration: int) -> bool:
    """Whether Megatron writes figures of this iteration; the answer is the same on all ranks."""
    has_writer = bool(args.tensorboard_dir) or bool(getattr(args, "wandb_project", ""))
    return has_writer and iteration % args.tensorboard_log_interval == 0


def write(entry: IterationMetrics, args: argparse.Namespace) -> None:
    """Hand figures to the writers that this rank has, as Megatron does."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    # Data sheets are for half precision, `seq1f1b calibrate` on a host measures single.
    is_half = args.bf16 or args.fp16
    peak = None if is_half == cpu_device.installed() else _peak_tflops()
    figures = dict(scalars(entry, peak_tflops=peak))
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard is not None:
        for name, value in figures.items():
            tensorboard.add_scalar(name, value, entry.iteration)
    if wandb is not None:
        wandb.log(figures, entry.iteration)


def scalars(
    entry: IterationMetrics, *, peak_tflops: float | None = None
) -> Iterator[tuple[str, float]]:
    """Yield names and values; those of stages have one name each.

    peak_tflops: of one device; MFU is the model's FLOP/s over it, and left out where it is unknown.
    """
    yield "seq1f1b/tokens-per-second", entry.tokens_per_second
    yield "seq1f1b/tflops-per-device", entry.tflops_per_device
    if peak_tflops is not None:
        yield "seq1f1b/mfu", entry.tflops_per_device / peak_tflops
    yield "seq1f1b/bubble-ratio", sum(entry.bubble_ratio) / len(entry.bubble_ratio)
    by_stage: tuple[tuple[str, Sequence[float]], ...] = (
        ("bubble-ratio", entry.bubble_ratio),
        ("peak-activation-mib", [number / _MIB for number in entry.peak_activation_bytes]),
        ("kv-carry-mib", [number / _MIB for number in entry.kv_carry_bytes]),
    )
    for name, values in by_stage:
        for stage, value in enumerate(values):
            yield f"seq1f1b-{name}/stage-{stage}", value


@cache
def _peak_tflops() -> float | None:
    """Return the fastest rate of this device, if it is known."""
    device = described_device()
    return None if device is None else device.bf16_tflops.value
