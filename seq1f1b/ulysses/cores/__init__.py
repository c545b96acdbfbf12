"""Attention cores, one file each, and which to take."""

from torch import Tensor

from seq1f1b.ulysses.cores.core import Core, attend
from seq1f1b.ulysses.cores.kernel import KernelCore
from seq1f1b.ulysses.cores.scope import Options, Scope
from seq1f1b.ulysses.cores.tiled import TiledCore

CORES: dict[str, Core] = {core.name: core for core in (KernelCore(), TiledCore())}
"""In the order in which they are tried."""


def choose_core(
    name: str | None, q: Tensor, v: Tensor, sinks: Tensor | None, scope: Scope, options: Options
) -> Core:
    """Return the core called ``name``, or the first that can compute this.

    Raises ValueError when there is no such core, or when it cannot.
    """
    if name is not None:
        if name not in CORES:
            raise ValueError(f"no attention core {name!r}; there are {', '.join(CORES)}")
        reason = CORES[name].refusal(q, v, sinks, scope, options)
        if reason:
            raise ValueError(f"attention core {name!r} does not take {reason}: choose another")
        return CORES[name]
    return next(c for c in CORES.values() if not c.refusal(q, v, sinks, scope, options))


__all__ = ["CORES", "Core", "Options", "Scope", "attend", "choose_core"]
