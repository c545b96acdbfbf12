"""The error of a rank that torchrun shows: in a file that is whole at any moment."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import errors

_VARIABLE = "TORCHELASTIC_ERROR_FILE"


class _WholeFile(errors.ErrorHandler):
    """Moves the file into place once it is written.

    torchrun reads the files of all ranks as soon as one has ended, and fails with a JSONDecodeError
    of its own, which hides the cause, at a file that another rank has only begun.
    """

    def record_exception(self, e: BaseException) -> None:
        path = os.environ.get(_VARIABLE)
        if path is None:
            super().record_exception(e)
            return
        begun = Path(path + ".part")
        os.environ[_VARIABLE] = str(begun)
        try:
            super().record_exception(e)
        finally:
            os.environ[_VARIABLE] = path
        begun.replace(path)


def record[**P, R](function: Callable[P, R]) -> Callable[P, Any]:
    """Return ``function``, whose error torchrun shows if this rank is the first that fails."""
    return errors.record(function, _WholeFile())
