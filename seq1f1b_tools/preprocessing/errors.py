"""The two ways in which a run ends early, told to the user in one message without a traceback."""

SETTING_EXIT_CODE = 2
DATA_EXIT_CODE = 1


class SettingError(Exception):
    """A flag's value cannot work; the message names the flag. The exit code is 2."""


class DataError(Exception):
    """The input, the disk or a worker failed on the way; nothing was published. Exit code 1."""
