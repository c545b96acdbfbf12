#!/usr/bin/env python
"""Tokenize JSON lines into Megatron's indexed dataset, under the name of Megatron's own tool.

The code is in seq1f1b_tools/preprocess_data.py; docs/data.md describes the flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seq1f1b_tools.preprocess_data import build_parser, command, main, run

__all__ = ["build_parser", "main", "run"]

if __name__ == "__main__":
    command()
