"""Put the adaptor under Megatron-Core in this process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.adaptor.patches import Attribute, Patch
    from megatron.adaptor.session import Session

_TRAINING = "megatron.training."
_sessions: list["Session"] = []
_trains: list["Session"] = []


def install() -> "Session":
    """Patch Megatron-Core and, where there is no GPU, redirect its device to the CPU.

    Returns the process's one session; a second call changes nothing. Raises
    UnsupportedMegatronError, before anything is changed, when the installed Megatron-Core is not
    one that the patches know.
    """
    if not _trains:
        with _imports_without_collections():
            _install()
    return _sessions[0]


def _install() -> None:
    from megatron.adaptor.patches import apply_all

    is_first = not _sessions
    session = _session()
    patches = session.patches()
    apply_all(patches if is_first else [p for p in patches if _is_of_training(p)])
    _trains.append(session)
    _sessions[:] = [session]


def session_of_core() -> "Session":
    """Return the process's session, with Megatron-Core patched but not ``megatron.training``."""
    if not _sessions:
        from megatron.adaptor.patches import apply_all

        session = _session()
        apply_all([patch for patch in session.patches() if not _is_of_training(patch)])
        _sessions.append(session)
    return _sessions[0]


def _session() -> "Session":
    if _sessions:
        return _sessions[0]
    from megatron.adaptor.cpu import device

    device.install()

    from megatron.adaptor.session import Session

    return Session("cpu" if device.installed() else "cuda")


def _is_of_training(patch: "Patch | Attribute") -> bool:
    return patch.target.startswith(_TRAINING)


@contextmanager
def _imports_without_collections() -> Iterator[None]:
    """Pause the garbage collector, and keep what is imported out of later collections.

    Modules are not garbage. Collections would look at hundreds of thousands of their objects again
    and again: an eighth of the time that imports take, and most of a full collection in training.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
