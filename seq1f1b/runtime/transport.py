"""Moves tensors between neighbouring stages; shapes are known to both ends beforehand."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from seq1f1b.errors import Seq1F1BError
from seq1f1b.schedule import Action, Kind, Schedule

Device = torch.device | str | int


class LinkError(Seq1F1BError, RuntimeError):
    """An exchange with another rank failed; the message names the rank."""


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


class Channel(NamedTuple):
    """One kind of traffic between two stages: activations or gradients, and which way it goes.

    Interleaved schedules send activations from the last stage back to the first, so with two
    stages they go both ways between the same pair of ranks.
    """

    is_forward: bool
    to_higher_stage: bool


ONE_CHUNK = (Channel(True, True), Channel(False, False))
ALL_CHANNELS = (*ONE_CHUNK, Channel(True, False), Channel(False, True))


class PointToPoint:
    """Sends and receives over torch.distributed, one process group per channel.

    NCCL runs what two ranks exchange over one group in the order of issue, so traffic that shares a
    group could wait for each other in a circle; gloo would tell it apart by tag alone.

    ranks: global rank of every stage. shape: the shape of the tensor that an action moves.
    """

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        *,
        ranks: Sequence[int],
        groups: Mapping[Channel, dist.ProcessGroup],
        shape: Callable[[Action], tuple[int, ...]],
        dtype: torch.dtype,
        device: Device,
    ) -> None:
        self._schedule = schedule
        self._stage = stage
        self._ranks = ranks
        self._groups = groups
        self._shape = shape
        self._dtype = dtype
        self._device = device
        self._leaving: list[tuple[dist.Work, Tensor, int]] = []

    def receive(self, action: Action) -> "_Arriving":
        """See Transport."""
        buffer = self._buffer(self._shape(action))
        rank, group, tag = self._route(action)
        work = dist.irecv(buffer, rank, group=group, tag=tag)
        assert work is not None, "this rank is not in its own pipeline's process group"
        return _Arriving(work, buffer, self._device, rank)

    def send(self, action: Action, tensor: Tensor) -> None:
        """See Transport."""
        self._leaving = [entry for entry in self._leaving if not entry[0].is_completed()]
        kept = self._outgoing(tensor.detach())
        rank, group, tag = self._route(action)
        work = dist.isend(kept, rank, group=group, tag=tag)
        assert work is not None, "this rank is not in its own pipeline's process group"
        self._leaving.append((work, kept, rank))

    def finish(self) -> None:
        """See Transport."""
        for work, _, rank in self._leaving:
            _wait(work, f"send to rank {rank}")
        self._leaving.clear()

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Return where a tensor arrives."""
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _outgoing(self, tensor: Tensor) -> Tensor:
        """Return what is handed to torch.distributed; it may not change until it has left."""
        return tensor.contiguous()

    def _route(self, action: Action) -> tuple[int, dist.ProcessGroup, int]:
        peer, _ = self._schedule.peer(self._stage, action)
        channel = Channel(
            is_forward=action.kind in (Kind.SEND_F, Kind.RECV_F),
            to_higher_stage=(peer > self._stage) == action.kind.is_send,
        )
        return self._ranks[peer], self._groups[channel], ALL_CHANNELS.index(channel)


class StagedPointToPoint(PointToPoint):
    """Goes through host memory, for stages that share a GPU, which NCCL does not allow.

    Process groups must be gloo's. A send waits until its tensor has been computed and copied, so
    this is for tests and measurements without a cluster.
    """

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, pin_memory=torch.cuda.is_available())

    def _outgoing(self, tensor: Tensor) -> Tensor:
        staged = self._buffer(tuple(tensor.shape))
        staged.copy_(tensor)
        return staged


def point_to_point(group: dist.ProcessGroup, device: Device) -> type[PointToPoint]:
    """Return the kind of links that ``group`` can make between tensors on ``device``."""
    is_staged = torch.device(device).type == "cuda" and dist.get_backend(group) == "gloo"
    return StagedPointToPoint if is_staged else PointToPoint


def connect(
    groups: Mapping[Channel, dist.ProcessGroup],
    stage: int,
    ranks: Sequence[int],
    device: Device,
) -> None:
    """Exchange one number over every link, one link after the other; all stages must call.

    NCCL connects two ranks when they first use a link, and both wait for each other there. In the
    middle of a schedule, whose receives are announced early, that wait could close a circle.
    """
    number = torch.zeros(1, device=device)
    for tag, channel in enumerate(ALL_CHANNELS):
        if channel not in groups:
            continue
        for source in range(len(ranks)):
            target = (source + (1 if channel.is_forward else -1)) % len(ranks)
            if target == source or (target > source) != channel.to_higher_stage:
                continue
            if stage == source:
                dist.send(number, ranks[target], group=groups[channel], tag=tag)
            elif stage == target:
                dist.recv(number, ranks[source], group=groups[channel], tag=tag)


class _Arriving:
    def __init__(self, work: dist.Work, buffer: Tensor, device: Device, rank: int) -> None:
        self._work = work
        self._buffer = buffer
        self._device = device
        self._rank = rank

    def wait(self) -> Tensor:
        _wait(self._work, f"receive from rank {self._rank}")
        return self._buffer.to(self._device, non_blocking=True)


def _wait(work: dist.Work, exchange: str) -> None:
    """Wait for an exchange; raises LinkError, which names it, when it fails.

    Errors that a signal handler raises meanwhile, as when a data worker dies, are not the link's.
    """
    try:
        work.wait()
    except RuntimeError as error:
        was_raised_in_python = error.__traceback__ is not None and error.__traceback__.tb_next
        if was_raised_in_python:
            raise
        raise LinkError(f"the {exchange} failed: {error}") from error
