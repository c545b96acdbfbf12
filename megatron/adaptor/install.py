"""Put the adaptor under Megatron-Core in this process."""

_installed: list[object] = []


def install() -> None:
    """Patch Megatron-Core and, where there is no GPU, redirect its device to the CPU.

    Safe to call twice. Raises UnsupportedMegatronError, before anything is changed, when the
    installed Megatron-Core is not one that the patches know.
    """
    if _installed:
        return
    from megatron.adaptor import cpu_device

    cpu_device.install()
    from megatron.adaptor.patches import apply_all
    from megatron.adaptor.session import Session

    session = Session("cpu" if cpu_device.installed() else "cuda")
    apply_all(session.patches())
    _installed.append(session)
