"""What a shard alone gets wrong, one file for each kind: how its values come from the group."""

from torch import nn

from seq1f1b.ulysses.mends.convolution import mend_convolutions
from seq1f1b.ulysses.mends.delta_rule import mend_delta_rule
from seq1f1b.ulysses.mends.rope import mend_rope
from seq1f1b.ulysses.mends.router import mend_router_losses
from seq1f1b.ulysses.mends.temperature import mend_temperature

_MENDS = (
    mend_rope,
    mend_temperature,
    mend_convolutions,
    mend_delta_rule,
    mend_router_losses,
)


def mend(model: nn.Module) -> None:
    """Apply every mend that the model has a place for; elsewhere they change nothing."""
    for each in _MENDS:
        each(model)


__all__ = ["mend"]
