"""Time, and copies that share links: a small event simulation's parts."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

_NOTHING = 1e-3
"""Bytes that a copy may lack when it is done, which is rounding."""

Then = Callable[[], None]


class Clock:
    """Runs what is due, in order of time; what is due at the same time in order of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Then]] = []
        self._numbers = count()

    def at(self, time: float, then: Then) -> None:
        """Call ``then`` at ``time``, which is not before now."""
        heapq.heappush(self._due, (time, next(self._numbers), then))

    def run(self) -> None:
        """Run until nothing is due any more."""
        while self._due:
            self.now, _, then = heapq.heappop(self._due)
            then()


@dataclass(eq=False)
class _Copy:
    remaining: float
    then: Then


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
        self.num_bytes = 0.0

    def copy(self, num_bytes: float, then: Then) -> None:
        """Start to copy now, and call ``then`` when it is done."""
        self._pass_time()
        self.num_bytes += num_bytes
        self._copies.append(_Copy(num_bytes, then))
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
            copy.then()


class Lane:
    """One direction of a GPU's own copies, one after the other, over its root's uplink."""

    def __init__(self, uplink: Uplink) -> None:
        self._uplink = uplink
        self._waiting: deque[tuple[float, Then]] = deque()
        self._busy = False

    def copy(self, num_bytes: float, then: Then) -> None:
        """Copy after what was asked for before, and call ``then`` when it is done."""
        self._waiting.append((num_bytes, then))
        if not self._busy:
            self._start()

    def _start(self) -> None:
        if self._waiting:
            self._busy = True
            num_bytes, then = self._waiting.popleft()
            self._uplink.copy(num_bytes, lambda: self._done(then))

    def _done(self, then: Then) -> None:
        self._busy = False
        self._start()
        then()


class Queue:
    """Work that one worker does in the order in which it is handed in."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._free = 0.0

    def work(self, seconds: float, then: Then) -> None:
        """Call ``then`` once ``seconds`` of work are done, behind what was handed in before."""
        self._free = max(self._free, self._clock.now) + seconds
        self._clock.at(self._free, then)
