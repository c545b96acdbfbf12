"""Time, and copies that share links: a small event simulation's parts."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Protocol

_NOTHING = 1e-3
"""Bytes that a copy may lack when it is done, which is rounding."""

Then = Callable[[], None]
Copied = Callable[[float], None]
"""Called when a copy is done, with the time when it began."""


class Clock:
    """Runs what is due, in order of time; what is due at the same time in order of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Then]] = []
        self._numbers = count()

    def at(self, time: float, then: Then) -> None:
        """Call ``then`` at ``time``, which is not before now."""
        heapq.heappush(self._due, (time, next(self._numbers), then))

    def step(self) -> bool:
        """Run what is due next; return whether there was anything."""
        if not self._due:
            return False
        self.now, _, then = heapq.heappop(self._due)
        then()
        return True

    def run(self) -> None:
        """Run until nothing is due any more."""
        while self.step():
            pass


class Queue:
    """Work that one worker does in the order in which it is handed in."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free = 0.0

    def work(self, seconds: float, then: Then) -> float:
        """Call ``then`` once ``seconds`` of work are done, behind what was handed in before.

        Return when the work begins.
        """
        start = max(self._free, self._clock.now)
        self._free = start + seconds
        self._clock.at(self._free, then)
        return start


class Road(Protocol):
    """One direction of a link that lanes share."""

    def copy(self, num_bytes: float, then: Copied) -> None:
        """Copy from now on, or when the link is free, and call ``then`` when it is done."""
        ...


class Turns:
    """One direction of a link that makes one copy at a time, in the order of asking.

    bandwidth: bytes per second.
    """

    def __init__(self, clock: Clock, bandwidth: float) -> None:
        self._queue, self._bandwidth = Queue(clock), bandwidth

    def copy(self, num_bytes: float, then: Copied) -> None:
        """See Road."""
        start = self._queue.work(num_bytes / self._bandwidth, lambda: then(start))


@dataclass(eq=False)
class _Copy:
    remaining: float
    start: float
    then: Copied


class Uplink:
    """One direction of the link above a root.

    Copies at the same time get equal shares of ``bandwidth``, and none more than ``lane``; both in
    bytes per second.
    """

    def __init__(self, clock: Clock, bandwidth: float, lane: float) -> None:
        self._clock, self._bandwidth, self._lane = clock, bandwidth, lane
        self._copies: list[_Copy] = []
        self._since = 0.0
        self._plan = 0

    def copy(self, num_bytes: float, then: Copied) -> None:
        """See Road."""
        self._pass_time()
        self._copies.append(_Copy(num_bytes, self._clock.now, then))
        self._plan_next()

    @property
    def _rate(self) -> float:
        return min(self._lane, self._bandwidth / len(self._copies))

    def _pass_time(self) -> None:
        elapsed, self._since = self._clock.now - self._since, self._clock.now
        if self._copies and elapsed > 0:
            moved = elapsed * self._rate
            for copy in self._copies:
                copy.remaining -= moved

    def _plan_next(self) -> None:
        self._plan += 1
        if self._copies:
            plan = self._plan
            first = min(max(0.0, copy.remaining) for copy in self._copies)
            self._clock.at(self._clock.now + first / self._rate, lambda: self._finish(plan))

    def _finish(self, plan: int) -> None:
        if plan != self._plan:
            return  # another copy has started since, which changed the shares
        self._pass_time()
        least = min(copy.remaining for copy in self._copies)
        done = [copy for copy in self._copies if copy.remaining <= max(least, _NOTHING)]
        self._copies = [copy for copy in self._copies if copy not in done]
        self._plan_next()
        for copy in done:
            copy.then(copy.start)


class Lane:
    """One direction of a GPU's own copies, one after the other, over its root's link."""

    def __init__(self, road: Road) -> None:
        self._road = road
        self._waiting: deque[tuple[float, Copied, Callable[[], bool]]] = deque()
        self._busy = False

    def copy(
        self, num_bytes: float, then: Copied, may_begin: Callable[[], bool] = lambda: True
    ) -> None:
        """Copy after what was asked for before, and call ``then`` when it is done.

        may_begin: whether it can begin; when that changes, ``go_on`` is to be called.
        """
        self._waiting.append((num_bytes, then, may_begin))
        self.go_on()

    def go_on(self) -> None:
        """Begin the next copy if it can."""
        if self._busy or not self._waiting or not self._waiting[0][2]():
            return
        self._busy = True
        num_bytes, then, _ = self._waiting.popleft()
        self._road.copy(num_bytes, lambda start: self._done(start, then))

    def _done(self, start: float, then: Copied) -> None:
        self._busy = False
        self.go_on()
        then(start)
