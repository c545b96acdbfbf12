#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron.

The code is in seq1f1b_tools/checkpoint/convert.py; docs/checkpoints.md describes the commands.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from seq1f1b_tools.checkpoint.convert import app

__all__ = ["app"]

if __name__ == "__main__":
    app()
