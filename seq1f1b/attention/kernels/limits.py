"""Which tensors an attention kernel takes, as data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Which device, types and heads a kernel takes.

    needs: what must be there, for people to read. device, dtypes: None for any. largest_head: of
    keys and values, None for any; head_multiple: both are multiples of it. equal_heads: values must
    be as wide as keys. other_heads: sizes of keys and values that are taken all the same.
    largest_deterministic: the largest head where torch is told to be deterministic, 0 for none at
    all, None where that changes nothing.
    """

    needs: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    largest_head: int | None = None
    head_multiple: int = 1
    equal_heads: bool = True
    other_heads: tuple[tuple[int, int], ...] = ()
    largest_deterministic: int | None = None

    def allow(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether tensors of this device, type and head size are within them."""
        return (
            self.device in (None, query.device.type)
            and (self.dtypes is None or query.dtype in self.dtypes)
            and self._allow_heads(key.shape[-1], value.shape[-1])
        )

    def _allow_heads(self, key_size: int, value_size: int) -> bool:
        largest = max(key_size, value_size)
        most = self.largest_deterministic
        if most is not None and largest > most and torch.are_deterministic_algorithms_enabled():
            return False
        if (key_size, value_size) in self.other_heads:
            return True
        return (
            (self.largest_head is None or largest <= self.largest_head)
            and (key_size == value_size or not self.equal_heads)
            and key_size % self.head_multiple == value_size % self.head_multiple == 0
        )


class Limited:
    """A kernel that takes what its limits allow."""

    limits: ClassVar[Limits]

    def supports(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """See Kernel."""
        return self.limits.allow(query, key, value)
