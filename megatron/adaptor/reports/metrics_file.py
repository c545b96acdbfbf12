"""A file with one line of JSON per iteration."""

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.adaptor.reports.metrics import IterationMetrics
from seq1f1b.files import number_in, set_aside

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends iterations to ``path``, each of which is in the file once.

    Lines of iterations that come again, as after a resumption, are moved to ``<path>.replaced``
    when the first line is written. A file that cannot be written is given up with a warning:
    training goes before its log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_open = False
        self._has_failed = False

    def append(self, metrics: IterationMetrics) -> None:
        """Write one line; numbers that are not finite become null."""
        if self._has_failed:
            return
        try:
            if not self._is_open:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                set_aside(self._path, lambda line: number_in(line, "iteration") < metrics.iteration)
                self._is_open = True
            with self._path.open("a") as stream:
                stream.write(json.dumps(_finite(asdict(metrics)), allow_nan=False) + "\n")
        except OSError as error:
            self._has_failed = True
            logger.warning("%s cannot be written, and gets no more metrics: %s", self._path, error)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
