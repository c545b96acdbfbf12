"""Who may compute: the steps of several runs, granted one after the other."""

import contextlib
import selectors
import socket
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from seq1f1b_tools.sweep.turns.rank import PLACE_VARIABLE, SOCKET_VARIABLE


class Turns:
    """Lets ``num_runs`` runs go on by a step each, one after the other, for as long as they last.

    A run asks for each step, through a socket whose path it finds in its environment. A step is
    granted when all ask: so no run computes meanwhile, and the first step waits until all are
    ready. A run that has no more steps closes its end, and is let go when all have.
    """

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._turn = 0
        self._asking: dict[int, socket.socket] = {}
        self._places: dict[socket.socket, int] = {}
        self._left: set[int] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="turns-")
        self._path = str(Path(self._folder.name) / "socket")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self._path)
        self._listener.listen()
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._conduct, daemon=True)

    def environment(self, place: int) -> dict[str, str]:
        """Return what the run with this ``place`` in the order needs, to ask."""
        return {SOCKET_VARIABLE: self._path, PLACE_VARIABLE: str(place)}

    def leave(self, place: int) -> None:
        """Go on without a run that has ended, perhaps before it could ask."""
        self._left.add(place)
        self._waker.send(b"!")

    def __enter__(self) -> "Turns":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._waker.close()
        self._thread.join()
        for end in (self._listener, self._woken):
            end.close()
        self._folder.cleanup()

    def _conduct(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as connections:
            for watched in (self._listener, self._woken):
                selector.register(watched, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    end = key.fileobj
                    assert isinstance(end, socket.socket)
                    if end is self._listener:
                        connection = connections.enter_context(end.accept()[0])
                        selector.register(connection, selectors.EVENT_READ)
                    elif said := _received(end):
                        if end is not self._woken:
                            self._places[end] = int(said)
                            self._asking[int(said)] = end
                    elif end is self._woken:
                        return
                    else:
                        selector.unregister(end)
                        if end in self._places:
                            self._left.add(self._places[end])
                self._grant()

    def _grant(self) -> None:
        remaining = [place for place in range(self._num_runs) if place not in self._left]
        if not remaining:
            for end in self._places:
                _wake(end)
        elif all(place in self._asking for place in remaining):
            place = next((place for place in remaining if place >= self._turn), remaining[0])
            self._turn = place + 1
            _wake(self._asking.pop(place))


def _wake(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended, which the sweep reports
        end.sendall(b"!")


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(16)
    except OSError:
        return b""
