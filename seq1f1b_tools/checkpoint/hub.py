"""Models by their names on the Hugging Face hub."""

import re
from pathlib import Path

from seq1f1b_tools.checkpoint.problem import ConversionError, one_line

_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors",)
_PICKLED = ("pytorch_model*.bin",)


def folder_of(model: str, revision: str | None, *, with_weights: bool) -> Path:
    """Return the folder of a model, which is fetched where ``model`` is a name on the hub.

    Raises:
        ConversionError: there is no such folder, or the hub has no such model or is out of reach.
    """
    folder = Path(model)
    if folder.exists():
        return folder
    if not _NAME.fullmatch(model):
        raise ConversionError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = _DESCRIPTION + (_WEIGHTS if with_weights else ())
    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
        if with_weights and not any(found.glob(_WEIGHTS[0])):
            patterns = _DESCRIPTION + _PICKLED
            snapshot_download(model, revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # the hub's client raises classes of every kind
        raise ConversionError(
            f"{model}: no such folder, and it cannot be fetched from the Hugging Face hub: "
            f"{one_line(error)}. Check the name and the network (HF_ENDPOINT, HF_HUB_OFFLINE and "
            "HF_TOKEN have a say), or give a folder that holds the model"
        ) from None
    return found
