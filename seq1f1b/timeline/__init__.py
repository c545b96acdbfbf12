"""Pictures of a schedule, planned and measured, from the same actions."""

from seq1f1b.schedule import Span
from seq1f1b.timeline.chrome import chrome_trace
from seq1f1b.timeline.model import Timeline
from seq1f1b.timeline.page import html_page
from seq1f1b.timeline.text import text_grid
from seq1f1b.timeline.trace import TraceError, read_trace, write_trace

__all__ = [
    "Span",
    "Timeline",
    "TraceError",
    "chrome_trace",
    "html_page",
    "read_trace",
    "text_grid",
    "write_trace",
]
