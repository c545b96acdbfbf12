#!/usr/bin/env python
"""Tokenize JSON lines into Megatron's indexed dataset, under the name of Megatron's own tool.

The code is in seq1f1b_tools/preprocess_data.py; docs/data.md describes the flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seq1f1b.processes import end_now
from seq1f1b_tools.preprocess_data import build_parser, main, run

__all__ = ["build_parser", "main", "run"]

if __name__ == "__main__":
    # Threads of an executor whose worker was killed may wait for ever at a usual exit.
    end_now(main())
