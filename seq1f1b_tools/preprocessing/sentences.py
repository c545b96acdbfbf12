"""Sentences from documents, with nltk's Punkt models."""

import os
import socket
from collections.abc import Callable

from seq1f1b_tools.preprocessing.errors import SettingError, from_extra

with from_extra("--split-sentences"):
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, PunktTokenizer

_MAX_CHARACTERS = 1_000_000  # upstream's tool hands Punkt no more than this at once
_DOWNLOAD_TIMEOUT = 15.0  # seconds


class _TrailingSpaceVars(PunktLanguageVars):
    """White space after a sentence is part of that sentence, so no newline is lost."""

    _period_context_fmt = r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"


def sentence_splitter(language: str, keep_newlines: bool) -> Callable[[str], list[str]]:
    """A function from a text to its sentences.

    Args:
        language: of Punkt's model, such as `english`.
        keep_newlines: keep the white space between sentences, at the end of each.

    Raises:
        SettingError: the model is not installed and cannot be fetched.
    """
    punkt = _load_punkt(language)
    if keep_newlines:
        punkt = PunktSentenceTokenizer(train_text=punkt._params, lang_vars=_TrailingSpaceVars())

    def split(text: str) -> list[str]:
        starts = range(0, len(text), _MAX_CHARACTERS)
        pieces = (text[start : start + _MAX_CHARACTERS] for start in starts)
        return [sentence for piece in pieces for sentence in punkt.tokenize(piece)]

    return split


def _load_punkt(language: str) -> PunktSentenceTokenizer:
    try:
        return PunktTokenizer(language)
    except ValueError as error:
        raise SettingError(f"--lang {language}: {error}") from error
    except LookupError:
        pass
    _fetch_models()
    try:
        return PunktTokenizer(language)
    except LookupError as error:
        raise SettingError(
            f"--split-sentences: nltk has no Punkt model for --lang {language}, and it could not "
            "be fetched. With a network: python -m nltk.downloader punkt_tab. Without: copy the "
            "folder tokenizers/punkt_tab from another machine into a folder that $NLTK_DATA names"
        ) from error


def _fetch_models() -> None:
    import nltk

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        nltk.download("punkt_tab", quiet=True, download_dir=os.environ.get("NLTK_DATA"))
    finally:
        socket.setdefaulttimeout(before)
