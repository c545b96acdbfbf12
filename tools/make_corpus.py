#!/usr/bin/env python
"""Make a corpus of Python source as JSON lines, and train a byte-level BPE on it.

The code is in seq1f1b_tools/make_corpus.py; docs/data.md describes the flags.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seq1f1b_tools.make_corpus import build_parser, main, run

__all__ = ["build_parser", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
