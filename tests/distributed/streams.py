"""Simulated GPU streams that report unordered accesses to the same memory."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Clock = dict[int, int]
"""For each queue, how many of its operations come before."""


class RaceError(AssertionError):
    """Two operations access the same memory, one writes, and neither waits for the other."""


class Stream:
    """A queue of operations with a vector clock: what happens before the next operation."""

    def __init__(self, number: int, host: "Stream | None") -> None:
        self.number, self.host = number, host
        self.before: Clock = {}

    def wait_event(self, event: "Event") -> None:
        for number, count in event.before.items():
            self.before[number] = max(count, self.before.get(number, 0))

    def wait_stream(self, other: "Stream") -> None:
        event = Event(None)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        assert self.host is not None
        self.host.wait_stream(self)

    def operate(self) -> tuple[int, int]:
        """Return the next operation's place, which comes after all that the host waited for."""
        if self.host is not None:
            self.wait_stream(self.host)
        self.before[self.number] = self.before.get(self.number, 0) + 1
        return self.number, self.before[self.number]


class Event:
    """What has happened before a place in a queue; streams: whose host can wait for it."""

    def __init__(self, streams: "Streams | None") -> None:
        self._streams = streams
        self.before: Clock = {}

    def record(self, stream: Stream) -> None:
        self.before = dict(stream.before)

    def synchronize(self) -> None:
        assert self._streams is not None
        self._streams.host.wait_event(self)


class Streams(TorchDispatchMode):
    """Stands for ``torch.cuda``: every operation is done at once, as if it were queued.

    slots: memory of the device. homes: memory of the host, in which the host itself operates,
    unless within ``stream``. Other memory is not looked at. Both may be added to. An operation
    raises RaceError.

    host: the queue of the thread of the host that runs. ``Executor`` and ``Future`` stand for
    those of ``concurrent.futures``: jobs are done at once, as if a thread did them.
    """

    def __init__(self, slots: Iterable[Tensor] = (), homes: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.host = Stream(0, None)
        self._made = 0
        self._compute = self._current = self.Stream()
        self._slots: set[int] = set()
        self._homes: set[int] = set()
        self._written: dict[int, tuple[int, int]] = {}
        self._read: dict[int, list[tuple[int, int]]] = {}
        self.num_operations = 0
        self.watch(slots, homes)

    def watch(self, slots: Iterable[Tensor], homes: Iterable[Tensor]) -> None:
        """Look at these from now on."""
        self._slots |= {_memory(tensor) for tensor in slots}
        self._homes |= {_memory(tensor) for tensor in homes}

    def Stream(self) -> Stream:
        return Stream(self._number(), self.host)

    def Event(self, *, blocking: bool) -> Event:
        return Event(self)

    def Executor(self, *_: Any, **__: Any) -> "_Executor":
        return _Executor(self, Stream(self._number(), None))

    def Future(self) -> "_Future":
        return _Future(self)

    def current_stream(self) -> Stream:
        return self._current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current, before = stream, self._current
        try:
            yield
        finally:
            self._current = before

    @contextlib.contextmanager
    def thread(self, queue: Stream) -> Iterator[None]:
        """Operate as another thread of the host."""
        self.host, before = queue, self.host
        try:
            yield
        finally:
            self.host = before

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema, kwargs = function._schema, kwargs or {}
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if not is_view:
            given = [*zip(schema.arguments, args, strict=False)]
            given += [(a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs]
            written, read = set[int](), set[int]()
            for argument, value in given:
                writes = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor):
                        (written if writes else read).add(_memory(tensor))
            self._access(function, written, read)
        return function(*args, **kwargs)

    def _number(self) -> int:
        self._made += 1
        return self._made

    def _access(self, function: Any, written: set[int], read: set[int]) -> None:
        touched = (written | read) & (self._slots | self._homes)
        if not touched:
            return
        is_of_host = self._current is self._compute and not touched & self._slots
        queue = self.host if is_of_host else self._current
        place = queue.operate()
        self.num_operations += 1
        for memory in touched:
            earlier = [self._written[memory]] if memory in self._written else []
            if memory in written:
                earlier += self._read.pop(memory, [])
            for number, count in earlier:
                if queue.before.get(number, 0) < count:
                    kind = "a slot" if memory in self._slots else "a home"
                    raise RaceError(f"{function} on {kind} does not wait for queue {number}")
            if memory in written:
                self._written[memory] = place
            else:
                self._read.setdefault(memory, []).append(place)


class _Executor:
    """A thread whose jobs come one after the other, each after what came before ``submit``."""

    def __init__(self, streams: Streams, queue: Stream) -> None:
        self._streams, self._queue = streams, queue

    def submit(self, job: Callable[[], None]) -> None:
        self._queue.wait_stream(self._streams.host)
        with self._streams.thread(self._queue):
            job()


class _Future(Future[None]):
    """Who waits for the result comes after what came before it."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams, self._event = streams, Event(streams)

    def set_result(self, result: None) -> None:
        self._event.record(self._streams.host)
        super().set_result(result)

    def result(self, timeout: float | None = None) -> None:
        self._event.synchronize()
        super().result(timeout)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
