"""Write docs/planner.md: how the planner works, and every prediction beside what was published.

python docs/planner.py
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from megatron.adaptor.memory_report import report  # noqa: E402
from seq1f1b.planner.catalogue import ScheduleName  # noqa: E402
from seq1f1b.planner.command_line import write_options  # noqa: E402
from seq1f1b.planner.gpu import gpu  # noqa: E402
from seq1f1b.planner.memory import GIB, MemoryTrace, trace_memory  # noqa: E402
from seq1f1b.planner.resolve import resolve  # noqa: E402
from seq1f1b.planner.runtime import runtime  # noqa: E402
from seq1f1b.planner.setting import Setting, megatron_values  # noqa: E402
from seq1f1b.planner.time import Kernels, step_time  # noqa: E402
from tests.planner.published import (  # noqa: E402
    LIMIT_GIB,
    MEAN,
    ODD,
    PEAK,
    SCHEDULES,
    THROUGHPUT,
    options_of,
)

# arXiv 2205.05198, table 5: layers, hidden, heads, TP, PP, VPP, micro-batch, batch, seconds of an
# iteration with full recomputation, and with selective and sequence parallelism
TABLE_5 = {
    "22B": (48, 6144, 64, 8, 1, 1, 4, 4, 1.42, 1.10),
    "175B": (96, 12288, 96, 8, 8, 3, 1, 64, 18.13, 13.75),
    "530B": (105, 20480, 128, 8, 35, 3, 1, 280, 49.05, 37.83),
    "1T": (128, 25600, 160, 8, 64, 1, 1, 512, 94.42, 71.49),
}

# Megatron-LM's README, H100, 48 replicas: TP, PP and TFLOP/s of a GPU. It names the parameters of
# each model and no shape; these layers and hidden sizes have that number to the digit shown, by
# 12 L h^2 + 13 L h + (2 V + 4096) h.
H100_ROWS = {
    "1.7B": (24, 2048, 1, 1, 408.8),
    "7.1B": (30, 4096, 2, 1, 465.9),
    "16B": (32, 6144, 4, 1, 489.1),
    "32B": (48, 7168, 8, 1, 459.6),
    "70B": (84, 8192, 8, 2, 419.7),
    "119B": (64, 12288, 8, 4, 420.5),
    "177B": (96, 12288, 8, 6, 432.8),
    "314B": (96, 16384, 8, 8, 474.4),
    "462B": (112, 18432, 8, 16, 459.9),
}


def setting_of(model: str, length: int, name: str, micro_batches: int | None = None) -> Setting:
    """Return a published setting."""
    return resolve(options_of(model, length, micro_batches), schedule=ScheduleName(name))


def memory_tables() -> tuple[str, str, str]:
    """Return the table of peaks, that of means, and a line of scores."""
    profile = runtime("megatron-2023")
    peaks, means, errors, mean_errors, right = [], [], [], [], 0
    for (model, length), row in PEAK.items():
        for name, value in zip(SCHEDULES, row, strict=True):
            setting = setting_of(model, length, name)
            trace = trace_memory(setting, profile)
            own = megatrons(setting)
            odd = (model, length, name) in ODD
            peaks.append(_peak_line(model, length, name, value, trace, own, odd))
            if not odd:
                right += (trace.peak_gib > LIMIT_GIB) == (value is None)
                errors += [trace.peak_gib / value - 1] if value else []
            mean = MEAN.get((model, length), (None,) * 4)[SCHEDULES.index(name)]
            if mean is not None:
                mean_errors.append(trace.mean_gib / mean - 1)
                means.append(
                    f"| {model} | {length // 1024}k | {name} | {mean:.2f} | {trace.mean_gib:.2f} | "
                    f"{mean_errors[-1]:+.1%} |"
                )
    score = (
        f"{right} of 47 out-of-memory cells, fullest stage {_mean(errors):.1%} off on average "
        f"(bias {sum(errors) / len(errors):+.1%}), {_within(errors)} of {len(errors)} within 10%; "
        f"mean over stages {_mean(mean_errors):.1%} off, {_within(mean_errors)} of "
        f"{len(mean_errors)} within 10%"
    )
    return "\n".join(peaks), "\n".join(means), score


def _peak_line(
    model: str,
    length: int,
    name: str,
    value: float | None,
    trace: MemoryTrace,
    own: float,
    odd: bool,
) -> str:
    error = f"{trace.peak_gib / value - 1:+.1%}" if value else "-"
    verdict = "odd" if odd else "yes" if (trace.peak_gib > LIMIT_GIB) == (value is None) else "NO"
    return (
        f"| {model} | {length // 1024}k | {name} | {value or 'X'} | {trace.peak_gib:.2f} | "
        f"{error} | {verdict} | {own:.1f} |"
    )


def megatrons(setting: Setting) -> float:
    """Return Megatron's own estimate, by its formula for sequence parallelism if it applies."""
    values = megatron_values(setting) | {"seq1f1b_splits": None, "seq1f1b_lengths": None}
    estimate = report(write_options(values), setting.num_gpus)
    return estimate.get("total_with_sequence_parallel", estimate["total"])


def ours() -> Iterator[str]:
    """Yield a line for each setting of today's runtime."""
    for model, length in (("30B", 65536), ("13B", 65536), ("7B", 131072)):
        for splits in (1, 4, 8):
            options = options_of(model, length) | {"seq1f1b_splits": splits}
            trace = trace_memory(resolve(options), runtime("current"))
            stage = trace.stages[trace.fullest]
            yield (
                f"| {model} | {length // 1024}k | {splits} | {stage.allocated / GIB:.1f} | "
                f"{stage.reserved / GIB:.1f} |"
            )


def throughput() -> tuple[str, str]:
    """Return the table of throughput and a line of scores."""
    kernels, profile = Kernels(gpu("a100-80g")), runtime("megatron-2023")
    lines, errors = [], []
    for (length, number), row in THROUGHPUT.items():
        rates = [
            step_time(setting_of("7B", length, name, number), kernels, profile).tokens_per_second
            for name in SCHEDULES
        ]
        for name, value, rate in zip(SCHEDULES, row, rates, strict=True):
            if value is None:
                continue
            ratio = ""
            if row[0] is not None:
                error = rate / rates[0] / (value / row[0]) - 1
                ratio = f"{value / row[0]:.3f} | {rate / rates[0]:.3f} | {error:+.1%}"
                errors += [error] if name in SCHEDULES[1:3] else []
            lines.append(
                f"| {length // 1024}k | {number} | {name} | {value:.0f} | {rate:.0f} | "
                f"{rate / value - 1:+.0%} | {ratio or '- | - | -'} |"
            )
    return "\n".join(lines), f"{max(map(abs, errors)):.1%} in {len(errors)} cells"


def table_5() -> Iterator[str]:
    """Yield a line for each model and recomputation of arXiv 2205.05198."""
    kernels, profile = Kernels(gpu("a100-80g")), runtime("current")
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    selective = {"recompute_granularity": "selective", "sequence_parallel": True}
    for name, shape in TABLE_5.items():
        layers, hidden, heads, tp, pp, vpp, mbs, batch, *measured = shape
        options = {
            "num_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "seq_length": 2048,
            "vocab_size": 51200,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "num_virtual_stages_per_pipeline_rank": vpp if vpp > 1 else None,
            "micro_batch_size": mbs,
            "global_batch_size": batch,
        }
        for word, changes, value in zip(
            ("full", "selective"), (full, selective), measured, strict=True
        ):
            seconds = step_time(resolve(options | changes), kernels, profile).seconds
            yield f"| {name} | {word} | {value:.2f} | {seconds:.2f} | {seconds / value - 1:+.0%} |"


def h100_rows() -> Iterator[str]:
    """Yield a line for each model of Megatron-LM's README: tokens/s of a GPU.

    Its TFLOP/s become tokens/s by arXiv 2104.04473's count of operations, without recomputation.
    """
    kernels, profile = Kernels(gpu("h100")), runtime("current")
    length, vocabulary, replicas = 4096, 131072, 48
    for name, (layers, hidden, tp, pp, teraflops) in H100_ROWS.items():
        setting = resolve(
            {
                "num_layers": layers,
                "hidden_size": hidden,
                "num_attention_heads": hidden // 128,
                "seq_length": length,
                "vocab_size": vocabulary,
                "untie_embeddings_and_output_weights": True,
                "tensor_model_parallel_size": tp,
                "sequence_parallel": tp > 1,
                "pipeline_model_parallel_size": pp,
                "micro_batch_size": 1,
                "global_batch_size": replicas * 16 * pp,
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            num_gpus=replicas * tp * pp,
        )
        operations = 72 * layers * hidden**2
        operations *= 1 + length / (6 * hidden) + vocabulary / (12 * layers * hidden)
        published = teraflops * 1e12 / operations
        rate = step_time(setting, kernels, profile).tokens_per_second / setting.num_gpus
        yield (
            f"| {name} | {layers} x {hidden} | {tp}, {pp} | {published:.0f} | {rate:.0f} | "
            f"{rate / published - 1:+.0%} |"
        )


def here() -> str:
    """Return what was measured on the machine of the stored results, if there is any."""
    files = {
        "wall time": "planner",
        "time that ranks spent on the core, replayed": "planner_core",
    }
    parts = []
    for title, name in files.items():
        path = ROOT / "benchmarks" / "results" / f"{name}.md"
        if not path.is_file():
            continue
        rows = json.loads(path.with_suffix(".json").read_text())["rows"]
        errors = [row["error"] for row in rows]
        memory = max(abs(error) for row in rows for error in row["memory_errors"])
        parts.append(
            f"**{title}**: {_within(errors)} of {len(errors)} ratios within 10%, "
            f"worst {max(errors, key=abs):+.1%}; activation bytes within {memory:.1%}.\n\n"
            f"{path.read_text()}"
        )
    return "\n".join(parts)


def stored(name: str) -> str:
    """Return a table from benchmarks/results, if it has been measured."""
    path = ROOT / "benchmarks" / "results" / f"{name}.md"
    return path.read_text() if path.is_file() else "Not measured yet.\n"


def _mean(errors: list[float]) -> float:
    return sum(map(abs, errors)) / len(errors)


def _within(errors: list[float]) -> int:
    return sum(abs(error) <= 0.1 for error in errors)


def switches() -> str:
    """Return the switches of the runtime of 2023 that differ from today's."""
    old, new = (runtime(name).model_dump() for name in ("megatron-2023", "current"))
    return "\n".join(
        f"| `{name}` | {old[name]} | {new[name]} |"
        for name in old
        if old[name] != new[name] and name not in ("name", "title", "source")
    )


def fill(template: str, parts: dict[str, Callable[[], str] | str]) -> str:
    """Return the template with every part in its place."""
    for name, part in parts.items():
        template = template.replace("{{" + name + "}}", part if isinstance(part, str) else part())
    return template


def main() -> None:
    """Write the page."""
    peaks, means, memory_score = memory_tables()
    rates, time_score = throughput()
    page = fill(
        (ROOT / "docs" / "planner.template.md").read_text(),
        {
            "switches": switches(),
            "peaks": peaks,
            "means": means,
            "memory score": memory_score,
            "ours": "\n".join(ours()),
            "throughput": rates,
            "time score": time_score,
            "table 5": "\n".join(table_5()),
            "h100": "\n".join(h100_rows()),
            "here": here(),
            "ranking": stored("planner_rank"),
            "cuts": stored("planner_cuts"),
            "cuts by the wall": stored("planner_cuts_wall"),
        },
    )
    (ROOT / "docs" / "planner.md").write_text(page)


if __name__ == "__main__":
    main()
