"""A file with the start and end of every action of one iteration, on all stages of a pipeline."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seq1f1b.files import replacing
from seq1f1b.schedule import Span
from seq1f1b.timeline import write_trace

logger = logging.getLogger(__name__)


def write(file: str, timed: Sequence[Span], group: Any) -> None:
    """Gather ``timed`` over the pipeline ``group``, whose first rank replaces ``file``.

    Every rank of ``group`` must call. Times count from the start of the iteration's step, which
    all stages began together. A file that cannot be written is given up with a warning.
    """
    stages: list[Sequence[Span]] | None = [()] * group.size() if group.rank() == 0 else None
    first = torch.distributed.get_process_group_ranks(group)[0]
    torch.distributed.gather_object(timed, stages, dst=first, group=group)
    if stages is None:
        return
    try:
        with replacing(Path(file)) as stream:
            for stage, entries in enumerate(stages):
                write_trace(stream, stage, entries)
    except OSError as error:
        logger.warning("the trace cannot be written to %s: %s", file, error)
