"""Process groups over gloo where Megatron asks for NCCL: part of ``cpu_device``."""

from __future__ import annotations

import datetime
import functools
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

OWNERS = (dist, distributed_c10d)
REASON = "NCCL backends and options; averages, split sizes and uneven parts as gloo takes them"


def prefer_loopback() -> None:
    """Let gloo use the loopback interface when all ranks of the job are on this machine.

    Otherwise it looks for an address under the machine's host name, which many laptops lack.
    """
    if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1"):
        return
    names = {name for _, name in socket.if_nameindex()}
    for loopback in sorted({"lo", "lo0"} & names):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def share_device() -> None:
    """Let all gloo groups of this process share one device.

    A device is a thread that wakes up a hundred times a second. Megatron makes dozens of groups,
    and a device for each of them takes a tenth of a core.
    """
    gloo: Any = dist.ProcessGroupGloo
    create, devices = gloo.__init__, list[Any]()

    @functools.wraps(create)
    def create_on_device(
        group: Any,
        store: Any,
        rank: int,
        size: int,
        timeout: Any = distributed_c10d.default_pg_timeout,
        **rest: Any,
    ) -> None:
        if not devices:
            names = os.environ.get("GLOO_SOCKET_IFNAME")
            devices.extend(
                [gloo.create_device(interface=name) for name in names.split(",")]
                if names
                else [gloo.create_default_device()]
            )
        if not isinstance(timeout, datetime.timedelta) or any(rest.values()):
            create(group, store, rank, size, timeout, **rest)
            return
        # Newer versions of torch pass omitted keywords as well; options accept none of them.
        options = gloo._Options()
        options._devices, options._timeout = devices, timeout
        create(group, store, rank, size, options)

    gloo.__init__ = create_on_device


@functools.cache
def replacements() -> dict[str, Callable[..., Any]]:
    """The functions of ``torch.distributed`` to replace, by name."""
    return {
        "init_process_group": _on_gloo(dist.init_process_group, 0, default="gloo"),
        "new_group": _on_gloo(dist.new_group, 2),
        "new_subgroups_by_enumeration": _on_gloo(dist.new_subgroups_by_enumeration, 2),
        "barrier": _barrier(dist.barrier),
        "all_reduce": _all_reduce(dist.all_reduce),
        "all_gather": _all_gather(dist.all_gather),
        "reduce_scatter": _reduce_scatter_list(dist.reduce_scatter),
        "reduce_scatter_tensor": _reduce_scatter(dist.reduce_scatter_tensor),
        "all_to_all_single": _all_to_all(dist.all_to_all_single),
    }


def _on_gloo(
    function: Callable[..., Any], position: int, default: str | None = None
) -> Callable[..., Any]:
    """A creator of process groups, whose ``backend`` is the ``position``-th argument."""

    def gloo(backend: str | None) -> str | None:
        if backend is None:
            return default
        return "gloo" if "nccl" in backend else backend

    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        if len(args) > position:
            args = (*args[:position], gloo(args[position]), *args[position + 1 :])
        else:
            kwargs["backend"] = gloo(kwargs.get("backend"))
        kwargs |= {name: None for name in ("device_id", "pg_options") if name in kwargs}
        return function(*args, **kwargs)

    return create


def _barrier(function: Callable[..., Any]) -> Callable[..., Any]:
    """``barrier`` without the device that NCCL wants to be told."""

    @functools.wraps(function)
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return function(group=group, async_op=async_op)

    return barrier


def _all_reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    """``all_reduce`` that averages: divide first, then sum, which asynchronous calls allow too.

    Megatron reduces over groups of one rank as well, several times in every forward; gloo takes a
    good part of a millisecond for each.
    """

    @functools.wraps(function)
    def all_reduce(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if not async_op and group is not None and dist.get_world_size(group) == 1:
            return None
        if op == dist.ReduceOp.AVG:
            tensor.div_(dist.get_world_size(group))
            op = dist.ReduceOp.SUM
        return function(tensor, op=op, group=group, async_op=async_op)

    return all_reduce


def _reduce_scatter(function: Callable[..., Any]) -> Callable[..., Any]:
    """``reduce_scatter_tensor`` that averages; its input is not its result, so it is copied."""

    @functools.wraps(function)
    def reduce_scatter(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if op == dist.ReduceOp.AVG:
            input = input / dist.get_world_size(group)
            op = dist.ReduceOp.SUM
        return function(output, input, op=op, group=group, async_op=async_op)

    return reduce_scatter


def _all_gather(function: Callable[..., Any]) -> Callable[..., Any]:
    """``all_gather`` of parts that differ in size, as ranks have of the tokens of their experts."""

    @functools.wraps(function)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if async_op or _are_even(tensor_list):
            return function(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            dist.broadcast(part, group=group, group_src=rank)
        return None

    return all_gather


def _reduce_scatter_list(function: Callable[..., Any]) -> Callable[..., Any]:
    """``reduce_scatter`` of parts that differ in size: the backward of such an ``all_gather``."""

    @functools.wraps(function)
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if async_op or _are_even(input_list):
            return function(output, input_list, op=op, group=group, async_op=async_op)
        parts = [part.clone() for part in input_list]
        for rank, part in enumerate(parts):
            dist.reduce(part, op=op, group=group, group_dst=rank)
        output.copy_(parts[dist.get_rank(group)])
        return None

    return reduce_scatter


def _are_even(parts: list[torch.Tensor]) -> bool:
    return len({part.shape for part in parts}) <= 1


def _all_to_all(function: Callable[..., Any]) -> Callable[..., Any]:
    """``all_to_all_single`` with split sizes as lists.

    Megatron turns them into lists when it moves them off the GPU, and they never were on one.
    """

    def sizes(splits: Any) -> Any:
        return splits.tolist() if isinstance(splits, torch.Tensor) else splits

    @functools.wraps(function)
    def all_to_all(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return function(
            output, input, sizes(output_split_sizes), sizes(input_split_sizes), **kwargs
        )

    return all_to_all
