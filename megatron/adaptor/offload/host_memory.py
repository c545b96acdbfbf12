"""Whether this machine has the memory for the model chunks that its ranks keep in it."""

import argparse
import os
from collections.abc import Iterable, Iterator
from math import ceil, log2
from pathlib import Path

import psutil

from megatron.adaptor.command_line.settings import Settings
from megatron.adaptor.cpu import device
from megatron.adaptor.reports.outlook import setting_of
from seq1f1b.planner.errors import SettingError
from seq1f1b.planner.memory import GIB
from seq1f1b.planner.memory.parameters import chunk_parameters, gradient_bytes, static_sizes
from seq1f1b.planner.setting import Setting

_CGROUPS = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60
# Where a group's limit, its use and the statistics of its use are, in version 2 and in version 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def shortage(args: argparse.Namespace, settings: Settings) -> str | None:
    """Return what to tell a user whose model does not fit into this machine's memory.

    args: Megatron's validated arguments. Nothing is said of a model that the planner does not
    describe. Every rank of the machine finds the same before any of them allocates.
    """
    if not settings.offload_chunks:
        return None
    try:
        setting = _setting(args)
    except SettingError:
        return None
    ranks = local_ranks(args)
    slots = 0 if device.has_gpu() else settings.offload_chunks
    stages = [stage_of(args, rank) for rank in ranks]
    needed = host_bytes(setting, stages, num_slots=slots, pinned=device.has_gpu())
    available = available_bytes()
    if needed <= available:
        return None
    return (
        f"--offload-model-chunks {settings.offload_chunks}: weights, gradients and optimizer "
        f"states of the {len(ranks)} rank(s) on this machine take at least {needed / GIB:.3g} GiB "
        f"of its memory, and {available / GIB:.3g} GiB are available: use more machines, a smaller "
        "model, or --grad-reduce-in-bf16"
    )


def host_bytes(
    setting: Setting, stages: Iterable[int], *, num_slots: int = 0, pinned: bool = False
) -> float:
    """Return the bytes that ranks of these ``stages``, one for each, keep in host memory at least.

    Weights, gradients and optimizer states in Megatron's precisions, and the float32 gradients that
    the optimizer makes of shorter ones. num_slots: of the device, where it is the host itself.
    pinned: whether the buffers of weights and gradients are, of which torch makes powers of two.
    Activations, data and programs are left out.
    """
    return sum(_stage_bytes(setting, stage, num_slots, pinned) for stage in stages)


def _stage_bytes(setting: Setting, stage: int, num_slots: int, pinned: bool) -> float:
    arguments, gradient = setting.arguments, gradient_bytes(setting)
    sizes = static_sizes(setting, stage)
    if gradient < 4 and not arguments.use_precision_aware_optimizer:
        # one for each element of the last optimizer state, which is in float32
        sizes.append(sizes[-1])
    chunks = [chunk_parameters(setting, chunk) for chunk in setting.chunks[stage]]
    if pinned:
        parts = [part for chunk in chunks for part in (chunk.dense, chunk.experts) if part]
        widths = setting.element_bytes, gradient
        sizes[:2] = [sum(2.0 ** ceil(log2(part * width)) for part in parts) for width in widths]
    largest = max(chunk.dense for chunk in chunks) + max(chunk.experts for chunk in chunks)
    return sum(sizes) + num_slots * largest * (setting.element_bytes + gradient)


def _setting(args: argparse.Namespace) -> Setting:
    """Describe the model to the planner, with a batch that every schedule takes.

    A model whose vocabulary is not known yet has none.
    """
    stages, data = args.pipeline_model_parallel_size, args.data_parallel_size
    changes = {
        "global_batch_size": args.micro_batch_size * data * stages,
        "microbatch_group_size_per_vp_stage": None,
        "seq1f1b_lengths": None,
    }
    if args.padded_vocab_size is None and args.vocab_size is None:
        changes["vocab_size"] = 1
    return setting_of(argparse.Namespace(**vars(args) | changes), splits=1)


def local_ranks(args: argparse.Namespace) -> range:
    """Return the ranks on this machine, of which a launcher other than torchrun tells only one."""
    number = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    first = args.rank - args.local_rank if number else args.rank
    return range(first, first + max(number, 1))


def stage_of(args: argparse.Namespace, rank: int) -> int:
    """Return the stage of a rank: as in Megatron, stages are the outermost kind of parallelism.

    With ``--use-tp-pp-dp-mapping`` replicas are outside of them.
    """
    stages = args.pipeline_model_parallel_size
    if args.use_tp_pp_dp_mapping:
        return rank // (args.tensor_model_parallel_size * args.context_parallel_size) % stages
    return rank // (args.world_size // stages)


def available_bytes() -> int:
    """Return the bytes that programs may still take on this machine, within their control group."""
    return min([psutil.virtual_memory().available, *left_in_groups()])


def left_in_groups(mounted: Path = _CGROUPS, groups: Path = _GROUPS) -> Iterator[int]:
    """Yield the room below every limit on this process; cached files do not count as used.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    for line in groups.read_text().splitlines() if groups.exists() else ():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root = mounted if number == "0" else mounted / "memory"
        below = root / path.lstrip("/")
        # In a container the group's own folder may be mounted in place of the root.
        for folder in {root, *(f for f in (below, *below.parents) if f.is_relative_to(root))}:
            yield from _left_in(folder)


def _left_in(folder: Path) -> Iterator[int]:
    for limit_file, use_file, cached in _FILES:
        try:
            limit = (folder / limit_file).read_text().strip()
            used = int((folder / use_file).read_text())
            statistics = (folder / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        if limit == "max" or int(limit) >= _UNLIMITED:
            continue
        by_name = dict(line.split(" ", 1) for line in statistics)
        yield int(limit) - used + int(by_name.get(cached, 0))
