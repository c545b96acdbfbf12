"""Seq1F1B under Megatron-Core.

``install()`` before anything else of Megatron is imported adds flags to Megatron's command line;
``enable(splits=4)`` is for training loops of other kinds.
"""

from megatron.adaptor.enable import enable
from megatron.adaptor.install import install

__all__ = ["enable", "install"]
