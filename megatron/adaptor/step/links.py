"""Process groups between the stages of a pipeline, and a step's point-to-point links over them."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from seq1f1b.runtime import (
    ALL_CHANNELS,
    ONE_CHUNK,
    Channel,
    PointToPoint,
    connect,
    point_to_point,
)
from seq1f1b.schedule import Action, Plan

Links = Mapping[Channel, Any]


def make_links(pipeline: Any, *, interleaved: bool, timeout: timedelta | None) -> Links:
    """Make and connect a process group per channel of this rank's pipeline; all ranks must call.

    pipeline: Megatron's group of the pipeline, whose ranks they have. timeout: how long an exchange
    may take; None means torch's default.
    """
    own = torch.distributed.get_process_group_ranks(pipeline)
    pipelines: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pipelines, own)
    each = sorted({tuple(ranks) for ranks in pipelines})
    links = {}
    for channel in ALL_CHANNELS if interleaved else ONE_CHUNK:
        links[channel], _ = torch.distributed.new_subgroups_by_enumeration(each, timeout=timeout)
    is_staged = torch.distributed.get_backend(pipeline) == "gloo"
    device = "cpu" if is_staged else torch.cuda.current_device()
    connect(links, pipeline.rank(), own, device)
    return links


def close_links(links: Links) -> None:
    """Destroy the process groups; the next step makes new ones."""
    for group in links.values():
        torch.distributed.destroy_process_group(group)


def transport(
    links: Links,
    plan: Plan,
    pipeline: Any,
    *,
    num_shares: int,
    micro_batch_size: int,
    hidden_size: int,
    dtype: torch.dtype,
) -> PointToPoint:
    """Return the links of one step, which exchange tensors ``[n / num_shares, b, hidden size]``.

    num_shares: ranks that have the tokens of a sub-sequence among them.
    """
    device = torch.cuda.current_device()

    def shape(action: Action) -> tuple[int, ...]:
        length = plan.cuts[action.micro_batch][action.sub_sequence].length
        return length // num_shares, micro_batch_size, hidden_size

    return point_to_point(pipeline, device)(
        plan.schedule,
        pipeline.rank(),
        ranks=torch.distributed.get_process_group_ranks(pipeline),
        groups=links,
        shape=shape,
        dtype=dtype,
        device=device,
    )
