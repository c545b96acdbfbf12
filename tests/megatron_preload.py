"""What a ``MegatronFork`` begins with: the adaptor installed, then Megatron imported.

The fork itself gets the variables that installing sets in the environment of a new process.
"""

import os

from megatron.adaptor import install

__all__ = ["prefer_loopback"]

os.environ["RANK"] = "1"  # only rank 0 warns that there is no GPU
install()

import pretrain_gpt  # noqa: E402, F401
from megatron.adaptor.cpu.gloo import prefer_loopback  # noqa: E402
