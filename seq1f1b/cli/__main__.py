"""``python -m seq1f1b.cli``, where the console script is not installed."""

from seq1f1b.cli import app

app()
