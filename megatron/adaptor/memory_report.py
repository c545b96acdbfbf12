"""Megatron's own estimate of memory, for ``seq1f1b memory``, which knows no Megatron."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence

_GIB = 1 << 30


def report(options: Sequence[str], num_gpus: int) -> dict[str, float]:
    """Return GiB of the fullest rank as ``megatron.training.theoretical_memory_usage`` has them.

    ``total`` is the sum of ``weights`` and ``activations`` in Megatron's log line;
    ``total_with_sequence_parallel`` takes the module's formula for sequence parallelism.
    ``options`` is a command line of Megatron's that has passed the planner's validation; Megatron
    parses and validates it as on ``num_gpus`` ranks. What it prints meanwhile is dropped. Raises
    ValueError when Megatron refuses the options.
    """
    from megatron.adaptor.install import install

    before, sys.argv = sys.argv, ["report", *options, "--train-iters", "1"]
    world = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(num_gpus)
    try:
        silence = io.StringIO()
        with (
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            install()
            return _estimate()
    except (AssertionError, SystemExit) as error:
        raise ValueError(f"Megatron refuses these options: {error}") from None
    finally:
        sys.argv = before
        if world is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = world


def _estimate() -> dict[str, float]:
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training import theoretical_memory_usage as usage
    from megatron.training.arguments import parse_args, validate_args

    args = parse_args()
    validate_args(args)
    if args.padded_vocab_size is None:
        args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args)
    num_micro_batches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    weights = usage.compute_weight_and_optimizer_memory(args)
    # as report_theoretical_memory chooses, whose line under sub-sequences is another one
    if args.sequence_parallel and args.recompute_granularity == "selective":
        activations = usage.compute_activation_memory(args, num_micro_batches)
    else:
        activations = usage.compute_activation_memory_without_sp(args, num_micro_batches)
    estimate = {"weights": weights, "activations": activations, "total": weights + activations}
    if args.sequence_parallel:
        shared = usage.compute_activation_memory(args, num_micro_batches)
        estimate["total_with_sequence_parallel"] = weights + shared
    return {name: number / _GIB for name, number in estimate.items()}
