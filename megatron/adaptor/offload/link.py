"""Links that copy model chunks between host memory and the device: on a GPU's streams, or the host.

On a machine without a GPU both are memory of the host, and a copy takes next to nothing. A paced
link makes it take as long as on a bus of a given bandwidth, beside the computations, so that
what a schedule of loads costs, and what loading ahead saves, can be timed there.
"""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from megatron.adaptor.cpu import device

Copy = Callable[[], None]
"""Copies when it is called."""
Work = Callable[[], None]
"""Computes, and may exchange, when it is called."""


class Copied(NamedTuple):
    """A copy that was asked for. Both raise its error.

    order: orders later computations and copies after it. synchronize: returns when it is made; any
    thread may call it.
    """

    order: Callable[[], None]
    synchronize: Callable[[], None]


class Direction(StrEnum):
    """Which way bytes go, as the device sees it."""

    IN = "in"
    OUT = "out"


class Link(Protocol):
    """What makes copies, those of one direction one after the other."""

    def compute(self, direction: Direction, work: Work) -> None:
        """Queue ``work`` of the device before the next copy, behind all computations so far."""
        ...

    def start(
        self, direction: Direction, num_bytes: int, copy: Copy, after: Sequence[Copied] = ()
    ) -> Copied:
        """Queue ``copy`` behind the copies of ``after`` and all computations so far."""
        ...

    def finish(self) -> None:
        """Return when no copy is under way, whether they raised or not."""
        ...


class DirectLink:
    """Makes every copy at once: it is done when ``start`` returns."""

    def compute(self, direction: Direction, work: Work) -> None:
        """See Link."""
        work()

    def start(
        self, direction: Direction, num_bytes: int, copy: Copy, after: Sequence[Copied] = ()
    ) -> Copied:
        """See Link."""
        copy()
        return Copied(_nothing, _nothing)

    def finish(self) -> None:
        """No copy is ever under way."""


class PacedLink:
    """Makes copies in a thread for each direction, as slowly as ``bytes_per_second`` says.

    root: ranks of this machine with the same number take turns, one direction apart from the other,
    as devices do under one root of the PCIe tree; None for a link of its own.
    """

    def __init__(self, bytes_per_second: float, root: int | None = None) -> None:
        self._bytes_per_second = bytes_per_second
        self._root = root
        self._lanes = {
            direction: ThreadPoolExecutor(1, thread_name_prefix=f"copies {direction}")
            for direction in Direction
        }

    def compute(self, direction: Direction, work: Work) -> None:
        """See Link. The device that computes is the host, beside the thread that copies."""
        work()

    def start(
        self, direction: Direction, num_bytes: int, copy: Copy, after: Sequence[Copied] = ()
    ) -> Copied:
        """See Link."""
        seconds = num_bytes / self._bytes_per_second
        made = self._lanes[direction].submit(self._make, direction, seconds, copy, after)
        return Copied(made.result, made.result)

    def finish(self) -> None:
        """See Link."""
        for lane in self._lanes.values():
            lane.submit(lambda: None).result()

    def _make(
        self, direction: Direction, seconds: float, copy: Copy, after: Sequence[Copied]
    ) -> None:
        for copied in after:
            copied.synchronize()
        with self._turn(direction):
            end = time.perf_counter() + seconds
            copy()
            time.sleep(max(0.0, end - time.perf_counter()))

    @contextlib.contextmanager
    def _turn(self, direction: Direction) -> Iterator[None]:
        """Have the root's link alone.

        Who waits for the link holds the place before it. So the rank that has just used the link
        cannot take it again before one that waits.
        """
        if self._root is None:
            yield
            return
        name = f"seq1f1b-{os.getuid()}-root-{self._root}-{direction}"
        place, link = (Path(tempfile.gettempdir(), f"{name}.{part}") for part in ("place", "link"))
        with contextlib.ExitStack() as held:
            with _locked(place):
                held.enter_context(_locked(link))
            yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system gives up for a process that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class CudaLink:
    """Queues copies on a stream of the current GPU for each direction; ``start`` waits for none.

    A copy comes after all that the current stream was given before: no kernel still reads the
    weights that a load overwrites, and none still adds to gradients that leave. cuda: torch.cuda,
    or what stands for it.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._lanes = {direction: cuda.Stream() for direction in Direction}

    def compute(self, direction: Direction, work: Work) -> None:
        """See Link. Later computations do not wait for ``work``."""
        with self._lane(direction):
            work()

    def start(
        self, direction: Direction, num_bytes: int, copy: Copy, after: Sequence[Copied] = ()
    ) -> Copied:
        """See Link."""
        with self._lane(direction) as lane:
            for copied in after:
                copied.order()
            copy()
        return self._copied(lane)

    def finish(self) -> None:
        """See Link."""
        for lane in self._lanes.values():
            lane.synchronize()

    @contextlib.contextmanager
    def _lane(self, direction: Direction) -> Iterator[Any]:
        """Queue what is called in the block behind all that the current stream has so far."""
        lane = self._lanes[direction]
        lane.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(lane):
            yield lane

    def _copied(self, lane: Any) -> Copied:
        # blocking: a thread that waits leaves its core to others
        event = self._cuda.Event(blocking=True)
        event.record(lane)
        return Copied(partial(self._order, event), event.synchronize)

    def _order(self, event: Any) -> None:
        self._cuda.current_stream().wait_event(event)


def _nothing() -> None:
    """What is left to wait for where a copy is made at once."""


def link_of(gb_per_second: float | None, roots: Sequence[int] | None, stage: int) -> Link:
    """Return the link of a ``stage``: paced if a pace is given, under its root if roots are.

    Of this machine's GPU if there is one, which has a pace of its own.
    """
    if device.has_gpu():
        return CudaLink()
    if gb_per_second is None:
        return DirectLink()
    return PacedLink(gb_per_second * 1e9, None if roots is None else roots[stage])
