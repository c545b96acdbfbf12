"""What a user did not expect of a checkpoint."""

from seq1f1b.errors import Seq1F1BError

_LONGEST = 400


class ConversionError(Seq1F1BError, ValueError):
    """A checkpoint that cannot be converted; the message names the file, tensor or setting."""


def one_line(error: BaseException) -> str:
    """Return what ``error`` says in one line, or its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def without_mtp(names: set[str], prefixes: tuple[str, ...], *, is_meant: bool) -> set[str]:
    """Return ``names`` without the layers for multi-token prediction, which have ``prefixes``.

    Raises:
        ConversionError: there are some, and to leave them out is not meant.
    """
    others = {name for name in names if name.startswith(prefixes)}
    if others and not is_meant:
        raise ConversionError(
            f"{min(others)} is of a layer for multi-token prediction, which is not converted: "
            "leave such layers out with --drop-mtp"
        )
    return set(names) - others


def is_file_name(text: str) -> bool:
    """Whether ``text`` names a file of a folder, and nothing outside of it."""
    return text not in ("", ".", "..") and not any(sign in text for sign in "/\\\0")
