"""Moves tensors between neighbouring stages; shapes are known to both ends beforehand."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from seq1f1b.schedule import Action, Kind, Schedule


class Pending(Protocol):
    """A tensor on its way."""

    def wait(self) -> Tensor:
        """Return the tensor, once it is there."""
        ...


class Transport(Protocol):
    """What the executor needs of a link."""

    def receive(self, action: Action) -> Pending:
        """Announce a receive and return at once."""
        ...

    def send(self, action: Action, tensor: Tensor) -> None:
        """Start a send and return at once; ``tensor`` may be dropped but not written to."""
        ...

    def finish(self) -> None:
        """Return when everything sent has left."""
        ...


class PointToPoint:
    """Sends and receives over torch.distributed, one process group per direction.

    With a group each, forward and backward traffic between two ranks never wait for each other
    (NCCL runs what shares a communicator in the order of issue; gloo tells them apart by tag).

    ranks: global rank of every stage. shape: the shape of the tensor that an action moves.
    """

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        *,
        ranks: Sequence[int],
        forward_group: dist.ProcessGroup,
        backward_group: dist.ProcessGroup,
        shape: Callable[[Action], tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._schedule = schedule
        self._stage = stage
        self._ranks = ranks
        self._groups = {True: forward_group, False: backward_group}
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._leaving: list[tuple[dist.Work, Tensor]] = []

    def receive(self, action: Action) -> "_Arriving":
        """See Transport."""
        buffer = torch.empty(self._shape(action), dtype=self._dtype, device=self._device)
        rank, group, tag = self._route(action)
        work = dist.irecv(buffer, rank, group=group, tag=tag)
        assert work is not None, "this rank is not in its own pipeline's process group"
        return _Arriving(work, buffer)

    def send(self, action: Action, tensor: Tensor) -> None:
        """See Transport."""
        self._leaving = [(work, kept) for work, kept in self._leaving if not work.is_completed()]
        kept = tensor.detach().contiguous()
        rank, group, tag = self._route(action)
        work = dist.isend(kept, rank, group=group, tag=tag)
        assert work is not None, "this rank is not in its own pipeline's process group"
        self._leaving.append((work, kept))

    def finish(self) -> None:
        """See Transport."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()

    def _route(self, action: Action) -> tuple[int, dist.ProcessGroup, int]:
        peer, _ = self._schedule.peer(self._stage, action)
        is_forward = action.kind in (Kind.SEND_F, Kind.RECV_F)
        return self._ranks[peer], self._groups[is_forward], int(is_forward)


class _Arriving:
    def __init__(self, work: dist.Work, buffer: Tensor) -> None:
        self._work = work
        self._buffer = buffer

    def wait(self) -> Tensor:
        self._work.wait()
        return self._buffer
