"""The two ways in which a run ends early, told to the user in one message without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from seq1f1b.errors import Seq1F1BError

SETTING_EXIT_CODE = 2
DATA_EXIT_CODE = 1


class SettingError(Seq1F1BError):
    """A flag's value cannot work; the message names the flag. The exit code is 2."""


class DataError(Seq1F1BError):
    """The input, the disk or a worker failed on the way; nothing was published. Exit code 1."""


@contextmanager
def from_extra(purpose: str) -> Iterator[None]:
    """Import packages in the block that only ``seq1f1b[data]`` installs.

    Raises:
        SettingError: one is not there; the message says what for.
    """
    try:
        yield
    except ImportError as error:
        raise SettingError(
            f"{purpose} needs the package {error.name}: pip install 'seq1f1b[data]'"
        ) from error
