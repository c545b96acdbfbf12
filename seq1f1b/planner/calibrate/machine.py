"""Describes this machine: measures with all local ranks busy at once, and writes the figures."""

import multiprocessing
import os
import platform
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from seq1f1b.files import replacing
from seq1f1b.planner.calibrate.kernels import ON_GPU, ON_HOST, Bench
from seq1f1b.planner.calibrate.links import collectives, message
from seq1f1b.planner.errors import CalibrationError
from seq1f1b.planner.gpu import THIS_MACHINE, Gpu
from seq1f1b.processes import end_with_starter, ending

_GIGA, _TERA, _MICRO = 1e9, 1e12, 1e-6
_HOST_SHARE = 0.9


def default_ranks() -> int:
    """Return as many ranks as there are GPUs, or cores."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0))


def calibrate(ranks: int) -> Gpu:
    """Measure with ``ranks`` ranks; takes one or two minutes.

    Raises CalibrationError when a rank ends before it has measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        if ranks == 1:
            _run(0, 1, folder)
        else:
            _run_together(ranks, folder)
        measured: list[dict[str, Any]] = [
            yaml.safe_load((Path(folder) / f"{rank}.yaml").read_text()) for rank in range(ranks)
        ]
    return _describe(measured, ranks)


def write(description: Gpu, path: Path) -> None:
    """Write a description where ``--gpu this-machine`` reads it."""
    text = yaml.safe_dump(
        description.model_dump(mode="json"), sort_keys=False, width=100, default_flow_style=None
    )
    with replacing(path, encoding="utf-8") as stream:
        stream.write(text)


def _run_together(ranks: int, folder: str) -> None:
    multiprocessing.set_forkserver_preload([__name__])
    try:
        start_processes(_run, args=(ranks, folder), nprocs=ranks, start_method="forkserver")
    except ProcessExitedException as error:
        raise CalibrationError(
            f"rank {error.error_index} ended {ending(error.exit_code)}. Out of memory? Then use "
            "fewer --ranks"
        ) from None


def _run(rank: int, ranks: int, folder: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    )
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        _take_cores(rank, ranks)
    if ranks > 1:
        end_with_starter()
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
        )
    bench = Bench(
        device, torch.bfloat16 if on_gpu else torch.float32, ON_GPU if on_gpu else ON_HOST
    )
    figures: dict[str, Any] = {
        "gemm": [list(point) for point in bench.products()],
        "attention": [[*shape, ahead, back] for shape, ahead, back in bench.attention()],
        "elementwise": [list(point) for point in bench.elementwise()],
        "launch": bench.launch(),
        "copy": bench.memory_rate(),
        "collectives": [],
        "message": [0.0, bench.memory_rate()],
    }
    if ranks > 1:
        figures["collectives"] = [list(point) for point in collectives(bench)]
        figures["message"] = list(message(bench))
        dist.destroy_process_group()
    (Path(folder) / f"{rank}.yaml").write_text(yaml.safe_dump(figures))


def _take_cores(rank: int, ranks: int) -> None:
    """Give a rank its share of the cores, as ranks of a training run have."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    first = rank * share % len(cores)
    os.sched_setaffinity(0, set(cores[first : first + share]))
    torch.set_num_threads(share)


def _mean(measured: Sequence[dict[str, Any]], name: str) -> list[list[Any]]:
    """Return the points of a list, each figure that was measured the mean over ranks."""
    points = zip(*(one[name] for one in measured), strict=True)
    return [[_mean_of(column) for column in zip(*point, strict=True)] for point in points]


def _mean_of(column: Sequence[Any]) -> Any:
    return sum(column) / len(column) if isinstance(column[0], float) else column[0]


def _describe(measured: Sequence[dict[str, Any]], ranks: int) -> Gpu:
    on_gpu = torch.cuda.is_available()
    attention = _mean(measured, "attention")
    elementwise = _mean(measured, "elementwise")
    latency, bandwidth = (
        sum(one["message"][index] for one in measured) / ranks for index in (0, 1)
    )
    launch = sum(one["launch"] for one in measured) / ranks
    gemm = _mean(measured, "gemm")
    title, memory = _device(ranks)
    source = f"measured on {title}, {ranks} rank(s) at once, {datetime.now(UTC):%Y-%m-%d}"

    def figure(value: float, source: str = source, kind: str = "measured") -> dict[str, Any]:
        return {"value": float(value), "kind": kind, "source": source}

    rate = sum(size / ahead for size, ahead, _ in elementwise) / len(elementwise)
    back = sum(back / ahead for _, ahead, back in elementwise) / len(elementwise)
    curves = {
        "name": f"{THIS_MACHINE}-curves",
        "title": f"kernels of {title}",
        "source": source,
        "kind": "measured",
        "gemm": gemm,
        "attention": [[*point[:5], point[5]] for point in attention],
        "backward_points": [[*point[:5], point[6]] for point in attention],
        "attention_backward": figure(1.0),
        "prefix_scaling": "geometric",
        "tile": 128 if on_gpu else 1,
        "elementwise": [[int(size), size / ahead / _GIGA] for size, ahead, _ in elementwise],
        "collectives": _by_kind(_mean(measured, "collectives"), ranks),
    }
    return Gpu.model_validate(
        {
            "name": THIS_MACHINE,
            "title": title,
            "source": source,
            "bf16_tflops": figure(max(point[3] for point in gemm), "the fastest product measured"),
            "memory_gib": figure(memory),
            "usable_gib": figure(
                memory * (0.96 if on_gpu else _HOST_SHARE), "a share of the memory", "assumed"
            ),
            "memory_gb_s": figure(rate / _GIGA),
            "memory_efficiency": figure(1.0, "the rate is that of a layer's elementwise kernels"),
            "backward_traffic": figure(back),
            "link": "nvlink" if on_gpu else "host",
            "link_gb_s": figure(bandwidth / _GIGA),
            "network_gb_s": figure(bandwidth / _GIGA, "one machine: as within it", "assumed"),
            "network_efficiency": figure(1.0, "the rate is that of messages"),
            "latency_us": figure(latency / _MICRO),
            "host_us": figure(launch / _MICRO),
            "action_us": figure(40 * launch / _MICRO, "40 operations of the executor", "assumed"),
            "gpus_per_node": ranks,
            "curves": curves,
            "runtime": "current" if on_gpu else "cpu",
        }
    )


def _by_kind(points: list[list[Any]], ranks: int) -> dict[str, list[list[Any]]]:
    kinds: dict[str, list[list[Any]]] = {}
    for kind, size, seconds in points:
        kinds.setdefault(kind, []).append([size, ranks, seconds * 1e3])
    return kinds


def _device(ranks: int) -> tuple[str, float]:
    """Return a name for the device and GiB of memory a rank has."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, properties.total_memory / (1 << 30)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0)) / ranks
    return f"{platform.machine()} CPU, {cores:g} core(s) a rank", total / ranks
