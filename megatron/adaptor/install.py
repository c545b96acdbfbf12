"""Put the adaptor under Megatron-Core in this process."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.adaptor.session import Session

_sessions: list["Session"] = []


def install() -> "Session":
    """Patch Megatron-Core and, where there is no GPU, redirect its device to the CPU.

    Returns the process's one session; a second call changes nothing. Raises
    UnsupportedMegatronError, before anything is changed, when the installed Megatron-Core is not
    one that the patches know.
    """
    if not _sessions:
        from megatron.adaptor.cpu import device

        device.install()

        from megatron.adaptor.patches import apply_all
        from megatron.adaptor.session import Session

        session = Session("cpu" if device.installed() else "cuda")
        apply_all(session.patches())
        _sessions.append(session)
    return _sessions[0]
