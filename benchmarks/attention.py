"""Prefix-causal attention against one causal call on the whole sequence, and against concatenation.

    python benchmarks/attention.py --lengths 8192 32768 131072 --output benchmarks/results/attention

One layer's attention, forward and backward, in three ways that alternate: whole (one call of the
kernel), ours (sub-sequence by sub-sequence over the KV carry, backwards in reverse), and as a
training script would do it with torch alone: keys and values of earlier sub-sequences concatenated
in front, autograd kept alive across them. Medians; on a GPU with the peak of the allocator.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import device_name, save, setting, table
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from seq1f1b.attention import CarryPool, causal_attention, choose_kernel
from seq1f1b.attention.kernels import KERNELS, Kernel
from seq1f1b.sequence import SubSequence, TokenCost, partition, sub_sequences

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def main() -> None:
    """Run the command line."""
    options = parse()
    device = torch.device(options.device)
    rows = []
    for length in options.lengths:
        inputs = make(options, length, device)
        for name in options.kernels or usable(inputs):
            rows += measure(options, name, inputs)
            for row in rows[-len(options.splits) :]:
                print(line(row), flush=True)
        del inputs
    about = setting(
        heads=options.heads,
        groups=options.groups,
        head=options.head_size,
        dtype=options.dtype,
        rounds=options.rounds,
        device=device_name() if device.type == "cuda" else "cpu",
    )
    report = table(about, HEADER, map(line, rows))
    if options.output:
        save(options.output, about, rows, report)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if has_gpu else "float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=32, help="heads of keys and values")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--kernels", nargs="*", help="default: all that support the tensors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    return parser.parse_args()


def make(options: argparse.Namespace, length: int, device: torch.device) -> Inputs:
    """Return query, key, value and output gradient, ``[length, 1, heads, head size]``."""
    generator = torch.Generator(device).manual_seed(1)
    counts = (options.heads, options.groups, options.groups, options.heads)
    query, key, value, grad = (
        torch.randn(
            (length, 1, count, options.head_size),
            generator=generator,
            device=device,
            dtype=getattr(torch, options.dtype),
        )
        for count in counts
    )
    return query, key, value, grad


def usable(inputs: Inputs) -> list[str]:
    """Return the kernels that take ``inputs``, without the reference, which is for tests."""
    query, key, value, _ = inputs
    names = [name for name, kernel in KERNELS.items() if kernel.supports(query, key, value)]
    return [name for name in names if name != "reference"]


def measure(options: argparse.Namespace, name: str, inputs: Inputs) -> list[dict[str, Any]]:
    """Time all numbers of splits and all ways in turn; return a row for each number."""
    kernel = choose_kernel(*inputs[:3], name)
    length = inputs[0].shape[0]
    ways: dict[tuple[str, int], Callable[[], None]] = {("whole", 1): lambda: whole(inputs, kernel)}
    for s in options.splits:
        # What a 7B model's tokens cost decides where the cuts are.
        cost = TokenCost.of_transformer(num_layers=32, hidden_size=4096, num_attention_heads=32)
        parts = sub_sequences(partition(length, s, method="uniform_comp", cost=cost))
        pool = CarryPool()
        ways["ours", s] = lambda parts=parts, pool=pool: ours(inputs, kernel, parts, pool)
        ways["concatenated", s] = lambda parts=parts: concatenated(inputs, parts)
    times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    peaks: dict[tuple[str, int], int | None] = {}
    for number in range(options.rounds + 1):
        for way, run in ways.items():
            seconds, peaks[way] = timed(run, inputs[0].device)
            if number:  # the first round warms up
                times[way].append(seconds)
    base = statistics.median(times["whole", 1])
    rows = []
    for s in options.splits:
        own, other = (statistics.median(times[way, s]) for way in ("ours", "concatenated"))
        rows.append(
            {
                "length": length,
                "kernel": name,
                "splits": s,
                "whole_ms": 1e3 * base,
                "over_whole": own / base,
                "concatenated_over_whole": other / base,
                "peak_bytes": peaks["ours", s],
                "peak_bytes_whole": peaks["whole", 1],
                "peak_bytes_concatenated": peaks["concatenated", s],
            }
        )
    return rows


def timed(run: Callable[[], None], device: torch.device) -> tuple[float, int | None]:
    """Return seconds, and on a GPU the most bytes allocated beyond what was there before."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3, torch.cuda.max_memory_allocated() - before


def whole(inputs: Inputs, kernel: Kernel) -> None:
    """One call each way."""
    *own, grad = (x.detach().requires_grad_() for x in inputs)
    output = causal_attention(*own, kernel=kernel, scale=_scale(inputs))
    torch.autograd.grad(output, own, grad)


def ours(inputs: Inputs, kernel: Kernel, parts: tuple[SubSequence, ...], pool: CarryPool) -> None:
    """Forwards in order, backwards in reverse, keys and values in the carry."""
    *tensors, grad = inputs
    done = []
    for part in parts:
        own = [x[part.start : part.stop].detach().requires_grad_() for x in tensors]
        carry = pool.carry("micro-batch", "layer", part.total, own[1], own[2])
        scale = _scale(inputs)
        output = causal_attention(*own, kernel=kernel, scale=scale, carry=carry, part=part)
        done.append((output, own, grad[part.start : part.stop]))
    while done:
        torch.autograd.grad(*done.pop())
    pool.release("micro-batch")


def concatenated(inputs: Inputs, parts: tuple[SubSequence, ...]) -> None:
    """What torch alone offers: earlier keys and values in front, one graph for all."""
    *tensors, grad = inputs
    own = [[x[p.start : p.stop].detach().requires_grad_() for x in tensors] for p in parts]
    outputs = []
    for part in parts:
        query, key, value = (
            torch.cat(
                [own[i][kind] for i in range(part.index + 1)] if kind else [own[part.index][0]]
            ).permute(1, 2, 0, 3)
            for kind in range(3)
        )
        bias = causal_lower_right(query.shape[2], key.shape[2])
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=_scale(inputs), enable_gqa=True
        )
        outputs.append(output.permute(2, 0, 1, 3))
    for part in reversed(parts):
        outputs[part.index].backward(grad[part.start : part.stop], retain_graph=part.index > 0)


def _scale(inputs: Inputs) -> float:
    return inputs[0].shape[-1] ** -0.5


HEADER = (
    "*ours*, *concatenated*: time of forward and backward over that of one whole call; peaks are "
    "beyond the inputs (whole, ours, concatenated).\n\n"
    "| tokens | kernel | s | whole ms | ours | concatenated | peaks MiB |\n|" + "---|" * 7
)


def line(row: dict[str, Any]) -> str:
    """Return ``row`` as a line of the table."""
    peaks = [row[f"peak_bytes{which}"] for which in ("_whole", "", "_concatenated")]
    shown = ", ".join("-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks)
    return (
        f"| {row['length']} | {row['kernel']} | {row['splits']} | {row['whole_ms']:.2f} | "
        f"{row['over_whole']:.3f} | {row['concatenated_over_whole']:.3f} | {shown} |"
    )


if __name__ == "__main__":
    main()
