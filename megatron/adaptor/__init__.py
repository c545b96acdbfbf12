"""Seq1F1B under Megatron-Core: call ``install()`` before anything else of Megatron is imported."""

from megatron.adaptor.install import install

__all__ = ["install"]
