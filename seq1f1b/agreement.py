"""Ranks of one job that were started alike, and that fail with a message."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from seq1f1b.errors import Seq1F1BError


class RanksDifferError(Seq1F1BError, RuntimeError):
    """Ranks of one job were started with different arguments or different code."""


def wait_for_first(rank: int, patience: float = 10.0) -> str:
    """Return what to put before an error of ``rank``, once rank 0 has had time to print its own.

    Launchers end all ranks when one has failed, and rank 0 may be the last to find out. So the
    others give it time, ``patience`` seconds; one that still lives then has an error of its own.
    """
    if rank == 0:
        return ""
    time.sleep(patience + int(os.environ.get("LOCAL_RANK", 0)))  # one of a machine is enough
    return f"rank {rank}: "


def check_same(own: dict[str, str], group: Any = None) -> None:
    """Raise RanksDifferError, with names, ranks and values, unless all ranks have the same entries.

    All ranks of ``group`` must call.
    """
    digests: list[Any] = [None] * dist.get_world_size(group)
    digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) == 1:
        return
    of_first: list[Any] = [own]
    dist.broadcast_object_list(of_first, group=group, group_src=0)
    names = own.keys() | of_first[0].keys()
    absent = "not there"
    differing = {
        name: own.get(name, absent)
        for name in names
        if own.get(name, absent) != of_first[0].get(name, absent)
    }
    by_rank: list[Any] = [None] * len(digests)
    dist.all_gather_object(by_rank, differing, group=group)
    lines = []
    for name in sorted(set().union(*by_rank)):
        by_value: dict[str, list[int]] = {}
        for rank, theirs in enumerate(by_rank):
            value = theirs.get(name, of_first[0].get(name, absent))
            by_value.setdefault(value, []).append(rank)
        values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_value.items())
        lines.append(f"{name} is {values}")
    raise RanksDifferError(
        f"the ranks of this job were not started alike: {'; '.join(lines)}. Start all of them with "
        "the same"
    )


def raise_on_all(own: str, kind: type[Exception]) -> None:
    """Raise what the first rank that has an error says, after its number unless it is rank 0.

    own: this rank's error, "" for none. All ranks must call, joined or not.
    """
    errors = [own]
    if dist.is_initialized():
        errors = [""] * dist.get_world_size()
        dist.all_gather_object(errors, own)
    for rank, error in enumerate(errors):
        if error:
            raise kind(f"rank {rank}: {error}" if rank else error)


def digest_of_code(*folders: Path) -> str:
    """Return a short digest of all Python files in ``folders``."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode())
            digest.update(file.read_bytes())
    return f"sha256 {digest.hexdigest()[:12]}"


def _ranks(ranks: list[int]) -> str:
    """Name ranks, the first eight of them."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
